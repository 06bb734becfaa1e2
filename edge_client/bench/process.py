"""The measured process, seen from the one that measures."""

from __future__ import annotations

import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import IO, Final, Self

import msgspec

from edge_client.bench.orders import Done, Failed, Order, Ready, Task
from edge_client.errors import BenchError

_TICK_S: Final = 0.25
_GRACE_S: Final = 1.0

Tick = Callable[[float], None]  # told the seconds since a window was ordered


class MeasuredProcess:
    """A child with one bundle. A context: at its end the child is gone."""

    def __init__(self, task: Task, name: str) -> None:
        """Raises BenchError when the bundle cannot be loaded, or loading it kills the child."""
        self._name = name
        # A session of its own: Ctrl-C is the parent's, which then ends the child.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edge_client.bench.child",
             msgspec.json.encode(task).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            self._check_ready()
        except BaseException:
            self.close()
            raise

    def _check_ready(self) -> None:
        answer = msgspec.json.decode(self._line(lambda _: None), type=Ready | Failed)
        if isinstance(answer, Failed):
            raise BenchError(answer.text)

    def take(self, order: Order, tick: Tick) -> Done:
        """One window. Raises BenchError when the child ends in it."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(msgspec.json.encode(order) + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return msgspec.json.decode(self._line(tick), type=Done)

    def close(self) -> None:
        """End the child, whatever it does: no more orders, then by signals."""
        with suppress(BrokenPipeError), self._child:  # closes the pipes, and waits
            assert self._child.stdin is not None
            self._child.stdin.close()
            for number in (None, signal.SIGTERM, signal.SIGKILL):
                if number is not None:
                    self._child.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(_GRACE_S)
                    return

    def _line(self, tick: Tick) -> bytes:
        """The child's next line; `tick` is called while it is awaited."""
        stdout: IO[bytes] | None = self._child.stdout
        assert stdout is not None
        begin_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not selector.select(_TICK_S):
                tick(time.monotonic() - begin_s)
        line = stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        return line

    def _ended(self) -> BenchError:
        code = self._child.wait()
        if code < 0:
            return BenchError(
                f"{self._name}: the measured process was ended by {signal.Signals(-code).name}; "
                "`musplit doctor` tells whether this ONNX Runtime runs here, and how much memory "
                "is left"
            )
        return BenchError(f"{self._name}: the measured process ended with code {code}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
