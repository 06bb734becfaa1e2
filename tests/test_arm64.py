"""The cache and the package reader behind `make arm64`, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from threading import Thread

import pytest
from harness import ROOT

from scripts.arm64.cache import UnavailableError, cache_folder, cached
from scripts.arm64.stage import boards_and_pin
from scripts.arm64.userland import CPUS, requirements


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_folder_is_built_once_also_by_several_builders():
    built = []

    def build(folder):
        built.append(folder)
        (folder / "file").write_text("whole")

    threads = [Thread(target=cached, args=("thing", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (cached("thing", build) / "file").read_text() == "whole"


def test_a_build_that_fails_leaves_nothing_and_the_next_one_builds():
    def fail(folder):
        (folder / "half").write_text("")
        raise UnavailableError("no mirror")

    with pytest.raises(UnavailableError, match="no mirror"):
        cached("thing", fail)
    assert [path.name for path in cache_folder().iterdir()] == ["thing.lock"]
    assert cached("thing", lambda folder: (folder / "whole").touch()).is_dir()


def test_the_wheels_are_those_of_the_plain_install_at_pinned_versions():
    wanted = dict(line.split("==") for line in requirements({"onnxruntime": "1.2.3"}))
    assert wanted["onnxruntime"] == "1.2.3"
    assert {"numpy", "paho-mqtt", "msgspec", "psutil"} <= set(wanted)
    assert "torch" not in wanted


@pytest.mark.parametrize("cpu", CPUS)
def test_every_processor_stands_for_boards_of_one_pin(cpu):
    boards, pin = boards_and_pin(cpu)
    assert boards
    assert pin not in {crash.version for board in boards for crash in board.runtime.crashes}


def test_the_stage_is_skipped_with_a_reason_where_nothing_can_be_fetched(tmp_path):
    nowhere = "http://127.0.0.1:1"
    done = subprocess.run(
        [sys.executable, "-m", "scripts.arm64.stage"], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": "",
             "XDG_CACHE_HOME": str(tmp_path / "empty")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "arm64: skipped: " in done.stdout
    assert "InRelease cannot be fetched" in done.stdout
