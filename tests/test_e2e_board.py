"""A board has the plain install: no torch, no exporter, no broker, no progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT, TINY, Bench, Child, Digests, free_port, make_shards, undisturbed
from packaging.requirements import Requirement

from export.exporter import export_model
from firmware_profiles.catalogue import load_profile
from musplit.cli import main

PLAIN = {
    "backports.zstd", "click", "cryptography", "msgspec", "numpy", "onnxruntime", "paho-mqtt",
    "psutil",
}  # fmt: skip
EXTRAS = ("torch", "onnx", "onnxscript", "matplotlib", "amqtt", "rich", "sklearn")
CONFIG = {**TINY, "devices.count": 1}
# Python imports this module at its start when the import path holds it.
BLOCKER = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> dict[str, str]:
    """Environment variables under which the extras cannot be imported, nor mosquitto found."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    (folder / "no-programs").mkdir()
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PATH": str(folder / "no-programs")}


@pytest.mark.parametrize("name", EXTRAS)
def test_the_extras_are_blocked_indeed(board, name):
    """Otherwise the tests below would show nothing."""
    child = subprocess.run(
        [sys.executable, "-c", f"import {name}"], env={**os.environ, **board}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert child.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named '{name}'"


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_works_on_a_board(board, tmp_path, command):
    with Bench(tmp_path) as bench:
        child = bench.run(*command.split(), "--help", env=board)
    assert child.code == 0, child.stderr
    assert child.stdout.startswith(f"Usage: python -m musplit {command}".rstrip())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["serve", "config.toml", "--broker", "127.0.0.1:1"], "pip install 'musplit[server]'"),
        (["bench", "--model", "lenet", "--meter", "model"], "pip install 'musplit[server]'"),
        (["export", "lenet", "--cut", "0", "--out", "x"], "pip install 'musplit[server]'"),
        (["emulate"], "pip install 'musplit[emulation]'"),
        (["broker", "--listen", "127.0.0.1:{port}"], "pip install 'musplit[emulation]'"),
        (["shard", "digits", "--devices", "2", "--out", "x"], "pip install 'musplit[emulation]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_needs_more_names_the_extra_to_install(board, tmp_path, command, said):
    with Bench(tmp_path) as bench:
        child = bench.run(*(part.format(port=free_port()) for part in command), env=board)
    assert child.code == 3
    error = child.stderr.splitlines()[-1]
    assert error.startswith("musplit: error: ")
    assert said in error
    assert "Traceback" not in child.stderr


class Served(NamedTuple):
    """A finished run whose only device ran on the board, and what its service manager heard."""

    device: Child
    run: Path
    heard: list[str]


@pytest.fixture(scope="module")
def served(board, tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("board")
    with Bench(folder) as bench, contextlib.ExitStack() as stack:
        address = bench.broker()
        (shard,) = make_shards(folder / "shards", 1)
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(folder / "notify"))
        manager.setblocking(False)
        told = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "600000"}
        device = bench.device("board", address, shard, env={**board, **told})
        device.wait_for("connected to")
        server = bench.serve(address, folder / "run", CONFIG)
        assert server.finish() == 0, server.stderr
        device.finish(15.0)
        return Served(device, folder / "run", list(heard(manager)))


def heard(manager: socket.socket) -> Iterator[str]:
    """What has been said by now; a socket keeps some messages, and what comes then is lost."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield manager.recv(100).decode()


def test_a_device_says_ready_when_the_broker_has_answered_and_then_stays_alive(served):
    assert served.heard[0] == "READY=1"
    assert served.heard.count("WATCHDOG=1") > 3


def test_a_device_without_torch_takes_part_in_a_run(served):
    assert served.device.code == 0, served.device.stderr
    summary = json.loads((served.run / "summary.json").read_text())
    assert summary["client_rounds"] == CONFIG["run.rounds"]
    assert Digests.of(summary) == undisturbed(CONFIG)


def test_a_run_can_be_replayed_without_torch(board, served, tmp_path):
    with Bench(tmp_path) as bench:
        child = bench.run("replay", str(served.run), "--format", "json", env=board)
    assert child.code == 0, child.stderr
    assert Digests.of(json.loads(child.stdout)) == undisturbed(CONFIG)


def test_a_board_measures_a_bundle_without_torch(board, tmp_path):
    export = export_model("mlp:16-8-4", "fc1", tmp_path / "halves", seed=0)
    evidence, profile = tmp_path / "evidence", tmp_path / "mine.toml"
    small = ("--window-s", "0.1", "--repeats", "1", "--batch", "4", "--directions", "2")
    with Bench(tmp_path) as bench:
        for command in (
            ("bench", "--bundle", export.client, "--out", evidence, "--meter", "model",
             "--profile", "laptop", *small),
            ("report", evidence),
            ("calibrate", evidence, "--profile", "laptop", "--out", profile),
        ):  # fmt: skip
            child = bench.run(*map(str, command), env=board)
            assert child.code == 0, child.stderr
    (entry,) = load_profile(str(profile)).speed.calibrated
    assert (entry.graph, entry.batch, entry.directions) == (export.manifest.graph.sha256, 4, 2)


def test_the_plain_install_asks_for_what_a_board_needs_and_nothing_else():
    parsed = [Requirement(text) for text in requires("musplit") or []]
    plain = {r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert plain == PLAIN
    assert "torch" in {r.name for r in parsed}


@pytest.mark.network
@pytest.mark.timeout(600)
def test_the_built_wheel_installs_and_runs_without_torch(tmp_path):
    """A fresh environment with the wheel: no extra comes along, and `device --help` works."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "runs", "tests", "*.egg-info", "__pycache__"
        ),
    )  # fmt: skip
    _check_call(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", source)
    (wheel,) = (tmp_path / "dist").glob("musplit-*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    _check_call(python, "-m", "pip", "install", "--quiet", wheel)
    listed = _check_call(python, "-m", "pip", "list", "--format", "json")
    names = {package["name"].lower() for package in json.loads(listed)}
    assert names >= PLAIN | {"musplit"}
    assert not names & {*EXTRAS, "scikit-learn"}
    shown = _check_call(tmp_path / "fresh" / "bin" / "musplit", "device", "--help")
    assert shown.startswith("Usage: musplit device")


def _check_call(*command: object) -> str:
    """The command's stdout; it must succeed. Runs outside the source tree."""
    child = subprocess.run(
        [str(part) for part in command], cwd="/", check=False, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout
