"""What makes the tests of a process quick, and a finished run to be damaged."""

import functools
import gc
import shutil
import sys

import pytest


def pytest_collection_finish():
    """Before the first test of a process, with everything imported."""
    if "torch" in sys.modules:  # importing it for tests that do without would take seconds
        from torch.onnx._internal.exporter._registration import (  # noqa: PLC0415
            ONNXRegistry,
        )

        # Each export compiles the same 500 functions again, which is most of its time.
        once = functools.cache(ONNXRegistry.from_torchlib)
        ONNXRegistry.from_torchlib = staticmethod(once)
    gc.freeze()  # torch's modules stay: no collection need look at them


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an undisturbed run of the module's `config`."""
    from emulation.inprocess import InProcessFleet  # noqa: PLC0415 - it imports torch
    from server_node.prepare import prepare  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("whole") / "run"
    InProcessFleet(prepare(config, folder)).run()
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")
