"""A journal replays to the same bits on another processor: aarch64 under user emulation.

Needs qemu-aarch64 and mmdebstrap, and package registries for an arm64 Python and the real aarch64
wheels: `make test ARGS="-m network"`. It stands for the instruction set, not for a board's speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from emulation.inprocess import InProcessFleet
from server_node.config import load_config
from server_node.prepare import prepare
from wire_protocol.manifest import sha256

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "msgspec", "click")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (shutil.which("qemu-aarch64") and shutil.which("mmdebstrap")),
        reason="qemu-aarch64 (package qemu-user) or mmdebstrap is not installed",
    ),
]


@pytest.fixture(scope="module")
def arm_python(tmp_path_factory):
    """A command prefix that runs an arm64 Python 3.11 with the wheels a replay needs."""
    folder = tmp_path_factory.mktemp("aarch64")
    root, site = folder / "root", folder / "site"
    subprocess.run(
        ["mmdebstrap", "--variant=extract", "--arch=arm64", "--include=python3,libstdc++6",
         "bookworm", str(root)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version=3.11", "--implementation=cp", "--dest", str(folder / "wheels"),
         *(f"--platform={platform}_aarch64" for platform in PLATFORMS),
         *(f"{name}=={version(name)}" for name in PACKAGES)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    for wheel in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    environment = {
        **os.environ, "PYTHONHOME": str(root / "usr"), "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
    }  # fmt: skip
    # The default CPU hides crashes that real boards show; cortex-a72 is a Raspberry Pi 4.
    command = ["qemu-aarch64", "-cpu", "cortex-a72", "-L", str(root)]
    return [*command, str(root / "usr/bin/python3.11"), "-S"], environment


def test_replay_on_aarch64_gives_the_digests_of_x86_64(arm_python, tmp_path):
    config = load_config(ROOT / "experiments" / "digits.toml", ["run.rounds=5", "method.tau=4"])
    run = InProcessFleet(prepare(config, tmp_path)).run()
    command, environment = arm_python
    done = subprocess.run(
        [*command, "-c", "import platform; print(platform.machine())"],
        check=True, capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "aarch64"
    done = subprocess.run(
        [*command, "-m", "musplit", "replay", str(tmp_path), "--format", "json"],
        check=True, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["matches"] is True
    assert result["client_sha256"] == sha256(run.client)
    assert result["server_sha256"] == sha256(run.server)
