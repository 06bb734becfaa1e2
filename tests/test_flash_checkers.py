"""Every file that `musplit flash` writes passes the strict checker of its format."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flash_support import PARTITIONS, Desk, make_folder

from firmware_profiles.provision.overlay import INSTALL_UNIT
from musplit.cli import main as command_line
from scripts.arm64.cache import UnavailableError, cached
from scripts.arm64.debian import Archive

FILES = Path(__file__).resolve().parent.parent / "firmware_profiles" / "provision" / "files"
UNIT = FILES / "musplit-device.service"
# From PyPI it lies beside this Python.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
_HOSTS = {"x86_64": "amd64", "aarch64": "arm64"}
# The keys and types that rpi-preseed's schema knows, of those that are written here.
PRESEED = {
    "config_version": str, "system.hostname": str, "user.name": str, "user.password": str,
    "user.password_encrypted": bool, "user.passwordless_sudo": bool, "ssh.enabled": bool,
    "ssh.password_authentication": bool, "ssh.authorized_keys": list, "wlan.ssid": str,
    "wlan.password": str, "wlan.password_encrypted": bool, "wlan.country": str,
    "runcmd.late": list, "runcmd.late_retries": int,
}  # fmt: skip


def needs(program):
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


@pytest.fixture
def cards(tmp_path):
    """A flashed card of every format, with everything that can be asked for."""
    desk = Desk(tmp_path)
    made = {}
    for name, python in (("bookworm", "3.11"), ("trixie", "3.13"), ("preseed", "3.13")):
        made[name] = make_folder(tmp_path / name, PARTITIONS[name])
        options = ("--boot-dir", str(made[name]), *desk.secure(), *desk.network())
        desk.flashed(*options, python=python)
    return made


def _check(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    # An unknown key is often only a warning on stderr, with exit code 0.
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shell_scripts_are_posix_and_clean(cards):
    _check(SHELLCHECK, "-s", "sh", cards["bookworm"] / "firstrun.sh")
    _check(SHELLCHECK, "-s", "sh", cards["bookworm"] / "musplit" / "install.sh")


@pytest.mark.skipif(os.geteuid() != 0, reason="the installer wants root")
def test_the_installer_follows_no_link_that_the_service_left(cards, tmp_path):
    """Its own words, with folders below the test's and a release that is there already."""
    seed, state, victim = tmp_path / "seed", tmp_path / "state", tmp_path / "victim"
    wheels = seed / "wheelhouse"
    for folder in (wheels, state, victim, tmp_path / "etc/systemd/system"):
        folder.mkdir(parents=True)
    script = (cards["bookworm"] / "musplit" / "install.sh").read_text()
    script = script.replace("/var/lib/musplit", str(state))
    for place in ("/opt/", "/etc/"):
        script = script.replace(place, f"{tmp_path}{place}")
    (seed / "install.sh").write_text(script)
    for name in ("musplit-device.service", "device.env"):
        shutil.copy(cards["bookworm"] / "musplit" / name, seed)
    (seed / "ca.pem").write_text("ca")
    (wheels / "machine").write_text(platform.machine())
    (wheels / "python").write_text("3.11")
    sums = "".join(
        f"{hashlib.sha256((wheels / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("machine", "python")
    )
    (wheels / "SHA256SUMS").write_text(sums)
    release = tmp_path / "opt/musplit-releases" / hashlib.sha256(sums.encode()).hexdigest()[:16]
    (release / "bin").mkdir(parents=True)
    (release / ".installed").touch()
    (release / "bin" / "musplit").write_text("#!/bin/sh\n")
    (release / "bin" / "musplit").chmod(0o755)
    (victim / "file").touch()
    os.chown(state, 12345, -1)
    (state / "shard.npz").symlink_to(victim / "file")
    install = ["sh", str(seed / "install.sh"), "--no-start"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (victim / "file").stat().st_uid == 0
    assert (state / "identity" / "ca.pem").stat().st_uid == 12345
    shutil.rmtree(state / "identity")
    (state / "identity").symlink_to(victim)
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "identity is a link" in done.stderr
    assert [path.name for path in victim.iterdir()] == ["file"]


def test_the_seed_calls_the_installer_and_removes_itself(cards):
    lines = (cards["bookworm"] / "firstrun.sh").read_text().splitlines()
    installs = [n for n, line in enumerate(lines) if "install.sh" in line]
    removes = [n for n, line in enumerate(lines) if line.startswith("rm ")]
    assert len(installs) == len(removes) == 1
    assert installs < removes
    assert lines[-1] == "exit 0"


def test_every_option_in_the_start_line_exists():
    start = re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)[1]
    known = {option for p in command_line.commands["device"].params for option in p.opts}
    assert set(re.findall(r"--[a-z-]+", start)) <= known


def test_every_option_of_the_enrolment_line_exists():
    line = re.search(r"^ExecStartPre=(.*)$", UNIT.read_text(), re.MULTILINE)[1]
    known = {option for p in command_line.commands["enroll"].params for option in p.opts}
    assert set(re.findall(r"--[a-z-]+", line)) <= known


@needs("systemd-analyze")
def test_systemd_accepts_the_unit_without_a_word_and_finds_it_hardened(cards, tmp_path):
    unit = tmp_path / UNIT.name
    text = (cards["bookworm"] / "musplit" / UNIT.name).read_text()
    unit.write_text(text.replace("=/opt/musplit/bin/musplit", "=/bin/true"))
    _check("systemd-analyze", "verify", unit)
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "offline" not in rated.stderr:  # systemd before 250 cannot
        assert rated.returncode == 0, rated.stdout[-300:]


@needs("systemd-analyze")
def test_systemd_accepts_the_unit_of_the_overlay_too(tmp_path):
    unit = tmp_path / "musplit-install.service"
    unit.write_text(INSTALL_UNIT)
    _check("systemd-analyze", "verify", unit)


def test_rpi_preseed_has_no_key_and_no_type_that_its_schema_lacks(cards):
    text = (cards["preseed"] / "rpi-preseed.toml").read_text()
    flat = {}
    for key, value in tomllib.loads(text).items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{key}.{name}".rstrip("."): entry for name, entry in inner}
    assert {key: type(value) for key, value in flat.items()} == PRESEED


@pytest.fixture(scope="module")
def strict():
    """A prefix that runs programs of Debian trixie, whose cloud-init refuses unknown keys."""
    host = _HOSTS.get(platform.machine())
    if host is None or not shutil.which("proot"):
        pytest.skip("cloud-init and netplan of Debian trixie need proot, on x86-64 or arm64")

    def build(folder):
        archive = Archive("trixie", host)
        for name in ("bin", "sbin", "lib", "lib64"):
            (folder / "usr" / name).mkdir(parents=True)
            (folder / name).symlink_to(f"usr/{name}")
        archive.unpack(archive.closure(["cloud-init", "netplan.io"], essential=True), folder)

    try:
        root = cached(f"checkers-trixie-{host}-1", build)
    except UnavailableError as error:
        pytest.skip(str(error))
    # Nobody manages services here; netplan would tell it to read what it has generated.
    quiet = [f"{root}/usr/bin/true:/usr/bin/{name}" for name in ("systemctl", "udevadm")]
    shared = ("/proc", "/dev", "/tmp", "/etc/ssl", *quiet)
    binds = [part for path in shared for part in ("-b", path)]
    return ["proot", "-r", str(root), *binds, "-w", "/"]


def _strictly(prefix, *command):
    return subprocess.run(
        [*prefix, *map(str, command)], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip


@pytest.mark.network
def test_cloud_init_of_a_strict_version_accepts_all_three_files(strict, cards, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("#cloud-config\nhostname: pi\nhostnames: pi\n")
    refused = _strictly(strict, "cloud-init", "schema", "--config-file", wrong)
    assert refused.returncode != 0, "this cloud-init lets unknown keys pass"
    for name, kind in (("user-data", "cloud-config"), ("network-config", "network-config")):
        file = cards["trixie"] / name
        done = _strictly(
            strict, "cloud-init", "schema", "--config-file", file, "--schema-type", kind
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert "Valid schema" in done.stdout


@pytest.mark.network
def test_netplan_generates_from_the_network_file(strict, cards, tmp_path):
    root = tmp_path / "root"
    (root / "etc" / "netplan").mkdir(parents=True)
    file = root / "etc" / "netplan" / "50-cloud-init.yaml"
    shutil.copy(cards["trixie"] / "network-config", file)
    file.chmod(0o600)
    done = _strictly(strict, "netplan", "generate", "--root-dir", root)
    assert (done.returncode, done.stderr) == (0, "")
    wpa = next(root.rglob("wpa-wlan0.conf")).read_text()
    # 64 hexadecimal digits without quotes are a key; in quotes they would be a passphrase.
    assert re.search(r"psk=[0-9a-f]{64}\n", wpa)
