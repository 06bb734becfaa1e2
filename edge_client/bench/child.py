"""The measured process: one bundle, nothing but what a device computes.

A process of its own, so that its peak memory is that of one cut, a crash of the runtime is a
finding, and sampling power costs it no time. It answers one JSON line on stdout for each on stdin.

    python -m edge_client.bench.child TASK      TASK is JSON
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_client.bench.gpio import Edge, open_edge
from edge_client.bench.orders import Done, Failed, Order, Ready, Task
from edge_client.bundle import read_bundle
from edge_client.memory import memory_bytes
from edge_client.power.phases import ENCODE, WAIT, Stopwatch
from edge_client.session import ClientSession
from edge_client.zo_step import Activation, PhaseClock, zo_step
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream
from wire_protocol.errors import MusplitError
from wire_protocol.frames import Frame, FrameKind, encode_frame
from wire_protocol.manifest import InputSpec

# So many iterations of a window are timed alone, about.
_ROWS: Final = 20_000
# Latency does not depend on what the numbers are; repeated benches still get the same.
_SEED: Final = 0
_NO_LABELS: Final = np.empty(0, np.uint32)


class Measured:
    """A loaded bundle, with inputs of the right shapes."""

    def __init__(self, task: Task) -> None:
        bundle = read_bundle(Path(task.folder))
        self._task = task
        self._theta = bundle.initial_parameters()
        self._session = ClientSession(bundle, task.batch, task.threads)
        self._generator = DirectionGenerator()
        draw = np.random.default_rng(_SEED)
        self._xs = [_inputs(spec, task.batch, draw) for spec in bundle.manifest.inputs]
        self._labels = np.zeros(task.batch, np.uint32)
        self._stopwatch = Stopwatch(time.monotonic)  # as the device program has one
        self._number = 0
        self.frame_bytes = 0

    def forward(self) -> PhaseClock:
        """One forward of a batch."""
        clock = PhaseClock(time.monotonic)
        begin_s = time.monotonic()
        self._session.forward(self._xs)
        clock.forward_s = time.monotonic() - begin_s
        return clock

    def step(self) -> PhaseClock:
        """One step as edge_client/trainer.py takes it, frames encoded and dropped."""
        task, clock = self._task, PhaseClock(time.monotonic, stopwatch=self._stopwatch)
        origin = DirectionId(_SEED, Stream.CLIENT_HALF, 0, self._number, 0, 0)
        self._number = (self._number + 1) % (1 << 32)
        size_bytes = 0
        for part in zo_step(
            self._session, self._theta, self._xs, origin, task.directions, task.lam,
            self._generator, clock,
        ):  # fmt: skip
            if part is None:
                continue
            begin_s = self._stopwatch.enter(ENCODE)
            first = isinstance(part, Activation)
            frame = Frame(
                FrameKind.ACTIVATION if first else FrameKind.DIFFERENCES, 0, 0, self._number,
                0 if isinstance(part, Activation) else part.first_k, part.tensor,
                self._labels if first else _NO_LABELS, task.encoding,
            )  # fmt: skip
            size_bytes += len(encode_frame(frame))
            clock.encode_s += self._stopwatch.enter(WAIT) - begin_s
        self.frame_bytes = size_bytes
        return clock


class Loop:
    """Takes windows. Which iterations are timed alone follows from how fast the last window was."""

    def __init__(self, measured: Measured, edge: Edge) -> None:
        self._measured = measured
        self._edge = edge
        self._seconds = {"forward": 0.0, "step": 0.0}  # of an iteration, as last seen

    def take(self, order: Order) -> Done:
        """One window."""
        rows: list[tuple[int, float, float, float, float]] = []
        edge = self._edge if order.edge else None
        if edge is not None:
            edge.set(high=True)
        cpu_s, begin_s = time.process_time(), time.monotonic()
        if order.kind == "idle":
            time.sleep(order.window_s)
            count, end_s = 0, time.monotonic()
        else:
            count, end_s = self._iterate(order, begin_s, rows)
        cpu_s = time.process_time() - cpu_s
        if edge is not None:
            edge.set(high=False)
        rss, peak = memory_bytes()
        return Done(
            begin_s, end_s, count, cpu_s, rss, peak,
            self._measured.frame_bytes if order.kind == "step" else 0, rows,
        )  # fmt: skip

    def _iterate(
        self, order: Order, begin_s: float, rows: list[tuple[int, float, float, float, float]]
    ) -> tuple[int, float]:
        """Fill `rows`; how many iterations, and when the last one ended."""
        run = self._measured.step if order.kind == "step" else self._measured.forward
        usual_s = self._seconds[order.kind]
        stride = max(1, int(order.window_s / usual_s / _ROWS)) if usual_s else 1
        count, last_s = 0, begin_s
        while last_s - begin_s < order.window_s or count < order.iterations:
            if count % stride:
                run()
                last_s = time.monotonic()
            else:
                one_s = time.monotonic()
                clock = run()
                last_s = time.monotonic()
                rows.append(
                    (count, last_s - one_s, clock.perturb_s, clock.forward_s, clock.encode_s)
                )
            count += 1
        self._seconds[order.kind] = (last_s - begin_s) / count
        return count, last_s


def _inputs(spec: InputSpec, batch: int, draw: np.random.Generator) -> NDArray[Any]:
    shape = (batch, *spec.shape)
    if spec.dtype == "int64":
        return draw.integers(0, spec.limit or 2, shape, np.int64)
    return draw.standard_normal(shape, np.float32)


def serve(task: Task, orders: BinaryIO, answers: BinaryIO) -> None:
    """Load, then answer orders until there are no more."""

    def answer(what: Ready | Done | Failed) -> None:
        answers.write(msgspec.json.encode(what) + b"\n")
        answers.flush()

    try:
        edge = open_edge(task.gpio)
        loop = Loop(Measured(task), edge)
    except MusplitError as error:
        answer(Failed(str(error)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the line must not stay high
    answer(Ready())
    try:
        for line in orders:
            answer(loop.take(msgspec.json.decode(line, type=Order)))
    finally:
        edge.close()


if __name__ == "__main__":
    keep_freed_memory()
    serve(msgspec.json.decode(sys.argv[1], type=Task), sys.stdin.buffer, sys.stdout.buffer)
