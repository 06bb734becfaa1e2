"""What a benchmark returns, and the way all of them take time: in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")  # names a piece of work

# A repetition calls each function as often as this takes, to be long against the clock's steps.
_AT_LEAST_S = 0.02


class Row(NamedTuple):
    """One figure: the median over the repetitions' ratios, and what it may be at most.

    `raw` holds every repetition's measurements, keys with their unit; a row without a limit
    informs, one without a ratio says in `note` why.
    """

    name: str
    ratio: float | None
    limit: float | None
    raw: dict[str, list[float]]
    note: str = ""


def in_turns(works: Mapping[Key, Callable[[], object]], repetitions: int) -> dict[Key, list[float]]:
    """Seconds a call of each work, one value a repetition; the works alternate.

    A load that comes and goes meets all of them alike: only their ratios are meant to be read.
    """
    counts: dict[Key, int] = {}
    for name, work in works.items():
        work()  # warm caches, lazy imports
        begin_s = time.perf_counter()
        work()
        counts[name] = max(1, round(_AT_LEAST_S / (time.perf_counter() - begin_s + 1e-9)))
    seconds: dict[Key, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            begin_s = time.perf_counter()
            for _ in range(counts[name]):
                work()
            seconds[name].append((time.perf_counter() - begin_s) / counts[name])
    return seconds


def ratio_row(
    name: str, limit: float | None, over: list[float], under: list[float],
    raw: dict[str, list[float]], note: str = "",
) -> Row:  # fmt: skip
    """The row of `over` / `under`, repetition by repetition."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return Row(name, statistics.median(ratios), limit, {**raw, "ratio": ratios}, note)
