"""The device's zeroth-order step: over its forwards, and what it costs beside them.

A step of K directions is one forward of the activation and 2 K perturbed ones. "Plain forwards" are
as many of the same graph with constant weights, prepacked, at ONNX Runtime's default optimisation.
The overhead of a direction is the step less its forwards, as the device's own session runs them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.halves import (
    ALEXNET,
    ALEXNET_2,
    LENET,
    LINEAR_2K,
    LINEAR_20K,
    TRANSFORMER,
    WIDE,
    Case,
    Half,
    open_half,
)
from benchmarks.rows import Row, in_turns, ratio_row
from edge_client.zo_step import PhaseClock, zo_step
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream

LAM: Final = 1e-3
ORIGIN: Final = DirectionId(1, Stream.CLIENT_HALF, 2, 3, 0, 0)
_WORDS_A_BLOCK, _SIGNS_A_BLOCK = 4, 256


def measure(repetitions: int) -> list[Row]:
    """All rows of this file."""
    rows = [
        _over_forwards("LeNet", LENET, 8, 1.8, repetitions),
        _over_forwards("AlexNet, two blocks", ALEXNET_2, 8, 1.8, repetitions),
        _over_forwards("AlexNet, all convolutions", ALEXNET, 2, 1.8, repetitions),
        _over_forwards("transformer block", TRANSFORMER, 2, 1.15, repetitions),
    ]
    for label, case, directions in (
        ("2 k", LINEAR_2K, 64), ("20 k", LINEAR_20K, 64), ("16 M", WIDE, 2),
    ):  # fmt: skip
        rows.append(_overhead(f"d_c {label}", case, directions, 3.0, repetitions))
    # Here the subtraction h+ - h- counts, which grows with the activation and not with d_c.
    rows.append(_overhead("AlexNet, two blocks", ALEXNET_2, 8, None, repetitions))
    return rows


def _over_forwards(label: str, case: Case, directions: int, limit: float, repetitions: int) -> Row:
    half = open_half(case)

    def forwards(forward: Callable[[], object]) -> None:
        for _ in range(1 + 2 * directions):
            forward()

    raw = in_turns(
        {
            "step_s": _step(half, half.session, directions),
            "constant_s": lambda: forwards(half.forward_constant),
            "inputs_s": lambda: forwards(lambda: half.session.forward([half.x])),
        },
        repetitions,
    )
    fed = np.median(raw["inputs_s"]) / np.median(raw["constant_s"])
    return ratio_row(
        f"step over its forwards with constant weights, {label} half, K {directions}", limit,
        raw["step_s"], raw["constant_s"], raw, f"forwards with fed weights alone: {fed:.2f}",
    )  # fmt: skip


class _Remembered:
    """The half's session, with the results of two forwards that were run before: costs nothing."""

    def __init__(self, half: Half) -> None:
        self.parameters = half.session.parameters
        self._results = [half.session.forward([half.x]) for _ in range(2)]

    def forward(self, xs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:  # noqa: ARG002
        self._results.reverse()
        return self._results[0]


def _overhead(
    label: str, case: Case, directions: int, limit: float | None, repetitions: int
) -> Row:
    half = open_half(case)
    raw = in_turns(
        {
            "overhead_s": _step(half, _Remembered(half), directions),
            "words_and_additions_s": _words_and_additions(half.theta, directions),
        },
        repetitions,
    )
    per_direction_us = np.median(raw["overhead_s"]) / directions * 1e6
    return ratio_row(
        f"overhead of a direction over its words and three additions, {label}", limit,
        raw["overhead_s"], raw["words_and_additions_s"], raw, f"{per_direction_us:.1f} us",
    )  # fmt: skip


def _step(half: Half, session: Any, directions: int) -> Callable[[], None]:
    generator = DirectionGenerator()

    def step() -> None:
        parts = zo_step(
            session, half.theta, [half.x], ORIGIN, directions, LAM, generator,
            PhaseClock(time.monotonic),
        )  # fmt: skip
        deque(parts, maxlen=0)

    return step


def _words_and_additions(theta: NDArray[np.float32], directions: int) -> Callable[[], None]:
    """For each direction: its words, and three sums of d_c elements."""
    generator = DirectionGenerator()
    blocks = -(-len(theta) // _SIGNS_A_BLOCK)
    other, out = np.ones_like(theta), np.empty_like(theta)

    def work() -> None:
        for k in range(directions):
            generator.words(ORIGIN._replace(k=k), 0, blocks)
            for _ in range(3):
                np.add(theta, other, out=out)

    return work
