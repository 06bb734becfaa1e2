"""The virtual clock: seconds that pass from event to event, and nobody sleeps."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

Happening = Callable[[], None]


class EventQueue:
    """A clock that starts at 0 s, and what is to happen when; equal times in the order given."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Happening]] = []

    def read_s(self) -> float:
        """The time."""
        return self._now_s

    def at(self, time_s: float, happening: Happening) -> None:
        """Let something happen at `time_s`, or as soon as the clock is asked when that is over."""
        heapq.heappush(self._heap, (time_s, next(self._order), happening))

    @property
    def next_s(self) -> float:
        """When the next thing happens; infinity when nothing does."""
        return self._heap[0][0] if self._heap else math.inf

    def spend(self, seconds: float) -> None:
        """Let time pass; what falls due waits for `happen`."""
        self._now_s += seconds

    def wait_until(self, time_s: float) -> None:
        """Let time pass up to `time_s`, if that lies ahead."""
        self._now_s = max(self._now_s, time_s)

    def happen(self) -> None:
        """Everything that is due, also what is found due meanwhile."""
        while self._heap and self._heap[0][0] <= self._now_s:
            heapq.heappop(self._heap)[2]()
