"""Import onnxruntime and run one inference, in a child process: a crash there is a result."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

_MODEL: Final = Path(__file__).with_name("probe.onnx")
# First output of the model (convolution, Relu, matrix product) on ones (2, 1, 8, 8), float32.
_EXPECTED: Final = 80.61035
_TOLERANCE: Final = 1e-3
DONE: Final = "done"
_START: Final = "start"
_NUMPY: Final = "import numpy"


class Outcome(NamedTuple):
    """How far the child came."""

    stage: str  # what it was doing: _START, _NUMPY, .. or DONE
    signal: int = 0  # the signal that ended it
    exit_code: int = 0
    timed_out: bool = False
    said: str = ""  # the exception, or the last line on stderr
    seconds: float = 0.0  # import and inference together

    @property
    def imports_numpy(self) -> bool:
        """Whether numpy was imported without harm."""
        return self.stage not in (_START, _NUMPY)


def probe_runtime(limit_s: float) -> Outcome:
    """Run the probe for at most `limit_s`. The process must be single-threaded: it forks."""
    # A fork needs nobody to start programs, as under an emulator, and inherits the import path.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as stderr:
        child = context.Process(target=_child, args=(sender, stderr.fileno()))
        began_s = time.monotonic()
        child.start()
        sender.close()
        child.join(limit_s)
        timed_out = child.is_alive()
        if timed_out:
            child.kill()
            child.join()
        seconds = time.monotonic() - began_s
        stage, said = _received(receiver)
        said = said or _last_line(stderr)
    code = child.exitcode or 0
    child.close()
    return Outcome(stage, max(0, -code), max(0, code), timed_out, said, seconds)


def _received(receiver: Connection[Any, Any]) -> tuple[str, str]:
    stage, said = _START, ""
    try:
        while True:
            stage, said = receiver.recv()
    except EOFError:
        return stage, said


def _last_line(stream: IO[bytes]) -> str:
    stream.seek(0)
    lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _child(sender: Connection[Any, Any], stderr: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(stderr, 2)
    stage = _NUMPY
    try:
        sender.send((stage, ""))
        import numpy as np  # noqa: PLC0415 - it may crash, and then here

        stage = "import onnxruntime"
        sender.send((stage, ""))
        import onnxruntime as ort  # noqa: PLC0415 - likewise

        stage = "load a model"
        sender.send((stage, ""))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            _MODEL.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        stage = "run a model"
        sender.send((stage, ""))
        (output,) = session.run(None, {"x": np.ones((2, 1, 8, 8), np.float32)})
        if abs(float(output[0, 0]) - _EXPECTED) > _TOLERANCE:
            raise ArithmeticError(f"gave {output[0, 0]}, not {_EXPECTED}")  # noqa: TRY301 - told below
        sender.send((DONE, ""))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent tells it
        first = next(iter(str(error).splitlines()), "")
        sender.send((stage, f"{type(error).__name__}: {first}"))
        os._exit(1)
    # Not through the interpreter's end: threads of a library may die loudly there.
    os._exit(0)
