"""Slows a device down on purpose: stragglers for studies, on a laptop or on a real bench.

The program stays the same; only the session is wrapped. Either a forward of t seconds is padded to
t / speed; or, for a device that stands for another board, forwards are held to a schedule: number i
of a round ends no sooner than i * forward_s after the round began. What other processes take from
this one comes out of the padding, and so do perturbing and encoding in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.zo_step import Forward


def no_delay(_number: int) -> float:
    """Nothing is waited for before a round."""
    return 0.0


class Pacing(NamedTuple):
    """How slow: `speed` 0.5 is half as fast; `forward_s` above 0 stands instead of it.

    `delay_s` gives the seconds to wait before the first forward of a round.
    """

    speed: float = 1.0
    forward_s: float = 0.0
    delay_s: Callable[[int], float] = no_delay


class PacedSession:
    """A session that takes its time."""

    def __init__(self, session: Forward, pacing: Pacing) -> None:
        self._session = session
        self._pacing = pacing
        self._due_s = 0.0
        self.parameters = session.parameters

    def start_round(self, number: int) -> None:
        """Wait the round's delay, and begin its schedule."""
        delay_s = self._pacing.delay_s(number)
        if delay_s:
            time.sleep(delay_s)
        self.go_on()

    def go_on(self) -> None:
        """A schedule from now on: after a wait that was the server's."""
        self._due_s = time.monotonic()

    def forward(self, xs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """As the session's, then the padding."""
        speed, forward_s, _ = self._pacing
        if forward_s:
            result = self._session.forward(xs)
            self._due_s += forward_s
            time.sleep(max(0.0, self._due_s - time.monotonic()))
            return result
        if speed == 1.0:
            return self._session.forward(xs)
        begin_s = time.thread_time()
        result = self._session.forward(xs)
        time.sleep((time.thread_time() - begin_s) * (1.0 / speed - 1.0))
        return result
