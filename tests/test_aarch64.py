"""The board's code on another processor: aarch64 under user emulation, with the real wheels.

Needs the network once, for an emulator, an arm64 Python and the wheels: `make test ARGS="-m
network"`. It stands for the instruction set, not for a board's speed; see docs/arm64.md.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from harness import ROOT

from emulation.inprocess import InProcessFleet
from scripts.arm64.cache import UnavailableError
from scripts.arm64.stage import boards_and_pin
from scripts.arm64.userland import CPUS, userland
from server_node.config import load_config
from server_node.prepare import prepare
from wire_protocol.manifest import sha256

CRASHING = "1.21.0"

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run_on(tmp_path_factory):
    """Run an arm64 Python with the wheels of the device program and one onnxruntime."""
    metadata = tmp_path_factory.mktemp("metadata")

    def _run(cpu, onnxruntime, *arguments):
        try:
            built = userland({"onnxruntime": onnxruntime})
        except UnavailableError as error:
            pytest.skip(str(error))
        return subprocess.run(
            [*built.python(cpu), *arguments], env={**os.environ, **built.variables(metadata)},
            check=False, capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    return _run


def doctor(run_on, cpu, onnxruntime, tmp_path, *options):
    """The exit code and the findings by check."""
    done = run_on(
        cpu, onnxruntime, "-m", "musplit", "doctor", "--format", "json",
        "--state", str(tmp_path), *options,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, {f["check"]: f for f in json.loads(done.stdout)["findings"]}


def test_replay_on_aarch64_gives_the_digests_of_x86_64(run_on, tmp_path):
    config = load_config(ROOT / "experiments" / "digits.toml", ["run.rounds=5", "method.tau=4"])
    run = InProcessFleet(prepare(config, tmp_path)).run()
    _, pin = boards_and_pin("cortex-a72")
    done = run_on("cortex-a72", pin, "-c", "import platform; print(platform.machine())")
    assert done.stdout.strip() == "aarch64", done.stderr
    done = run_on("cortex-a72", pin, "-m", "musplit", "replay", str(tmp_path), "--format", "json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["matches"] is True
    assert result["client_sha256"] == sha256(run.client)
    assert result["server_sha256"] == sha256(run.server)


@pytest.mark.parametrize("options", [("--profile", "rpi-4b"), ()], ids=["profile", "no profile"])
def test_doctor_catches_an_onnxruntime_that_crashes_on_a_raspberry_pi_4(run_on, tmp_path, options):
    code, found = doctor(run_on, "cortex-a72", CRASHING, tmp_path, *options)
    finding = found["onnxruntime"]
    _, pin = boards_and_pin("cortex-a72")
    assert code == 1
    assert finding["level"] == "error"
    assert f"{CRASHING} died of SIGILL (signal 4)" in finding["what"]
    assert f"pip install onnxruntime=={pin}" in finding["remedy"]
    assert "memory" in found  # the checks after it


@pytest.mark.parametrize("cpu", CPUS)
def test_the_profile_s_pin_passes(run_on, tmp_path, cpu):
    boards, pin = boards_and_pin(cpu)
    for board in boards[:1]:
        _, found = doctor(run_on, cpu, pin, tmp_path, "--profile", board.name)
        assert found["onnxruntime"]["level"] == "ok", found["onnxruntime"]
        for check in ("onnxruntime-pin", "architecture", "cpu-features", "python", "glibc"):
            assert found[check]["level"] == "ok", found[check]
