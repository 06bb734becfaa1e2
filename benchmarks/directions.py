"""Directions at 64 MB: generated and added, over a copy of as many bytes."""

from __future__ import annotations

import numpy as np

from benchmarks.rows import Row, in_turns, ratio_row
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream

ELEMENTS = 64_000_000 // 4


def measure(repetitions: int) -> list[Row]:
    """The limit is the first row; the second is a direction whose words are there already."""
    base = np.random.default_rng(0).standard_normal(ELEMENTS, np.float32)
    out = np.empty_like(base)
    generator = DirectionGenerator()
    direction = DirectionId(1, Stream.CLIENT_HALF, 2, 3, 0, 0)
    octets = generator.signs_packed(direction, ELEMENTS)
    raw = in_turns(
        {
            "generate_and_add_s": lambda: generator.add_scaled(direction, 1e-3, base, out),
            "add_packed_s": lambda: generator.add_packed(octets, 1e-3, base, out),
            "memcpy_s": lambda: np.copyto(out, base),
        },
        repetitions,
    )
    copy_s = raw["memcpy_s"]
    return [
        ratio_row(
            "directions generated and added, 64 MB, over memcpy", 3.0,
            raw["generate_and_add_s"], copy_s, raw,
        ),
        ratio_row(
            "packed directions added, 64 MB, over memcpy", None, raw["add_packed_s"], copy_s, raw
        ),
    ]  # fmt: skip
