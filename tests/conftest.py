"""What makes the tests of a process quick: torch's exporter reads its translations once."""

import functools
import gc
import sys


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
