"""Slows a device down on purpose: stragglers for studies, on a laptop or on a real bench.

The program stays the same; only the session is wrapped. A forward of t seconds is padded to
t / speed, and the first forward of each round waits `delay_s` before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.zo_step import Forward


class PacedSession:
    """A session that takes its time. `speed` 0.5 is half as fast; 1 pads nothing."""

    def __init__(self, session: Forward, speed: float, delay_s: float) -> None:
        self._session = session
        self._pad = 1.0 / speed - 1.0
        self._delay_s = delay_s
        self.parameters = session.parameters

    def start_round(self) -> None:
        """Wait the fixed delay."""
        if self._delay_s:
            time.sleep(self._delay_s)

    def forward(self, xs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """As the session's, then the padding."""
        if not self._pad:
            return self._session.forward(xs)
        begin_s = time.thread_time()
        result = self._session.forward(xs)
        time.sleep((time.thread_time() - begin_s) * self._pad)
        return result
