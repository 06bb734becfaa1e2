"""From a FAT image to a device that trains, inside an ARM64 userland, without its network.

The files are taken out of the image where the board would mount it; the seed, its installer and
the lines of its service then run there, as a Raspberry Pi 4's processor. By proot and user-mode
emulation: neither root nor binfmt. Imager's helpers of Raspberry Pi OS are stubs that note
what they were asked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flash_support import PARTITIONS, PASSPHRASE, make_image, needs_fat, unpack
from harness import ROOT, TINY, Bench, flags, free_port, make_shards

from scripts.arm64.cache import UnavailableError
from scripts.arm64.userland import userland

pytestmark = [pytest.mark.network, pytest.mark.timeout(3000), needs_fat]
CPU = "cortex-a72"
STATE = "/var/lib/musplit"
STUB = '#!/bin/sh\necho "$0" "$1" >>/var/log/first-boot\n'
# The system call behind os.access is newer than proot, which looks for the path on this machine.
ACCESS = "import os; os.access = lambda path, *_, **__: os.path.exists(path)\n"
LIMIT_BYTES = 50_000_000


class Board:
    """A root file system, and commands in it."""

    def __init__(self, prefix: list[str], root: Path) -> None:
        self.prefix, self.root = prefix, root

    def command(self, *command: str) -> list[str]:
        return [*self.prefix, *command]

    def run(self, *command: str, timeout_s: float = 2400.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*command), capture_output=True, text=True, check=False,
            timeout=timeout_s, env=self.environment(),
        )  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        """A board's, not this machine's."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", **more}

    def service_lines(self, key: str) -> list[list[str]]:
        """The unit's commands, with their variables filled in as systemd does."""
        unit = (self.root / "etc/systemd/system/musplit-device.service").read_text()
        values = {**self.settings(), "STATE_DIRECTORY": STATE}
        lines = re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)
        return [list(_expand(line, values)) for line in lines]

    def settings(self) -> dict[str, str]:
        text = (self.root / "etc/musplit/device.env").read_text()
        return dict(re.findall(r'^([A-Z_]+)="(.*)"$', text, re.MULTILINE))


def _expand(line, values):
    for word in shlex.split(line):
        if re.fullmatch(r"\$[A-Z_]+", word):  # alone, without braces: several words
            yield from values[word[1:]].split()
        else:
            filled = re.sub(r"(?<!\$)\$\{([A-Z_]+)\}", lambda m: values[m[1]], word)
            yield filled.replace("$$", "$")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """An arm64 Debian Bookworm with Raspberry Pi OS's helpers stubbed."""
    root = tmp_path_factory.mktemp("board") / "root"
    try:
        land = userland({"onnxruntime": "1.24.4"})
        land.copy_root(root)
        prefix = land.inside(CPU, root)
    except UnavailableError as error:
        pytest.skip(str(error))
    for name in ("usr/lib/raspberrypi-sys-mods/imager_custom", "usr/lib/userconf-pi/userconf"):
        stub = root / name
        stub.parent.mkdir(parents=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    for name in ("etc/sudoers.d", "var/log", "boot"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return Board(prefix, root)


def _say(text: str) -> None:
    """A figure, for whoever runs with -s."""
    sys.stdout.write(f"\n{text}\n")


def _musplit(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "musplit", *command], cwd=cwd, check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_flashed_card_installs_offline_enrols_joins_over_tls_and_trains(board, tmp_path):
    """Image -> firstrun.sh -> install.sh -> ExecStartPre -> ExecStart -> a run to its end."""
    broker_port, enrol_port = free_port(), free_port()
    _musplit("ca", "init", "--host", "127.0.0.1", cwd=tmp_path)
    lab = tmp_path / "musplit-ca"
    _musplit("ca", "enroll", "pi-1", "--out", "pi-1.token", cwd=tmp_path)
    _musplit("ca", "broker-config", "--out", "broker", "--listen", f"127.0.0.1:{broker_port}",
             cwd=tmp_path)  # fmt: skip
    shards = make_shards(tmp_path / "shards", 1)
    (tmp_path / "passphrase").write_text(PASSPHRASE)
    image = make_image(tmp_path / "card.img", PARTITIONS["bookworm"], size_mb=160)
    facts = json.loads(_musplit(
        "flash", "--profile", "rpi-4b", "--device-id", "pi-1", "--image", str(image),
        "--broker", f"127.0.0.1:{broker_port}", "--ca", str(lab / "ca.pem"),
        "--token-file", "pi-1.token", "--enrol-url", f"https://127.0.0.1:{enrol_port}",
        "--shard", str(shards[0]), "--wifi-ssid", "lab", "--wifi-country", "DE",
        "--wifi-passphrase-file", "passphrase", "--format", "json", cwd=tmp_path,
    ))  # fmt: skip
    size_bytes = sum(c["size_bytes"] for c in facts["changes"] if "/wheelhouse/" in c["name"])
    _say(f"wheelhouse: {size_bytes / 1e6:.1f} MB")
    assert size_bytes <= LIMIT_BYTES

    unpack(image, board.root / "boot/firmware")
    began_s = time.monotonic()
    done = board.run("/bin/sh", "/boot/firmware/firstrun.sh")
    log = (board.root / "boot/firmware/musplit/install.log").read_text()
    _say(f"seed and installer on {CPU}: {time.monotonic() - began_s:.0f} s")
    assert done.returncode == 0, done.stderr
    assert "starts at boot" in log, log
    asked = (board.root / "var/log/first-boot").read_text()
    assert "set_hostname" in asked
    assert "set_wlan" in asked
    boot = board.root / "boot/firmware"
    assert not (boot / "firstrun.sh").exists()
    assert "systemd." not in (boot / "cmdline.txt").read_text()
    # Secrets have left the partition that everybody on the board can read.
    assert not (boot / "musplit/enrol.token").exists()
    assert not (boot / "musplit/shard.npz").exists()
    token = board.root / f"{STATE[1:]}/identity/enrol.token"
    assert token.stat().st_mode & 0o777 == 0o600

    began_s = time.monotonic()
    again = board.run("/bin/sh", "/boot/firmware/musplit/install.sh")
    _say(f"installer again: {time.monotonic() - began_s:.0f} s")
    assert again.returncode == 0, again.stderr
    assert "installing release" not in again.stdout

    (site,) = board.root.glob("opt/musplit-releases/*/lib/python3.11/site-packages")
    (site / "proot.pth").write_text(ACCESS)
    _trains(board, tmp_path, lab, enrol_port, broker_port)


def _trains(board, folder, lab, enrol_port, broker_port):
    """The service's own lines, against a lab on this machine."""
    config = {**TINY, "run.rounds": 3, "devices.count": 1}
    with Bench(folder / "bench") as bench:
        services = (
            bench.start("ca", "serve", "--dir", str(lab), "--listen", f"127.0.0.1:{enrol_port}"),
            bench.start(
                "broker", "--tls", str(folder / "broker"), "--listen", f"127.0.0.1:{broker_port}"
            ),
        )
        for service in services:
            service.wait_for("listening on")
        (first,) = board.service_lines("ExecStartPre")
        done = subprocess.run(
            board.command(*first), capture_output=True, text=True, check=False, timeout=300,
            env=board.environment(**board.settings(), STATE_DIRECTORY=STATE),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        identity = board.root / f"{STATE[1:]}/identity"
        assert (identity / "device.key").stat().st_mode & 0o777 == 0o600
        assert not (identity / "enrol.token").exists()
        server = bench.start(
            "serve", str(ROOT / "experiments/digits.toml"),
            "--broker", f"127.0.0.1:{broker_port}", "--identity", str(lab / "servers/lab"),
            "--out", str(folder / "run"),
            *flags(config),
        )  # fmt: skip
        (start,) = board.service_lines("ExecStart")
        began_s = time.monotonic()
        with (folder / "device.log").open("w") as log:
            device = subprocess.Popen(
                board.command(*start), stderr=log, env=board.environment(), text=True
            )
            try:
                assert server.finish(900.0) == 0, (
                    server.stderr + (folder / "device.log").read_text()
                )
                code = device.wait(60.0)
            finally:
                device.kill()
        _say(f"enrolled device, 3 rounds over TLS: {time.monotonic() - began_s:.0f} s")
    said = (folder / "device.log").read_text()
    assert code == 0, said
    assert "over TLS 1.3" in said
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["client_rounds"] == 3
