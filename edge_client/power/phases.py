"""What the device program is doing: at any moment one of six phases, which share all its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

PERTURB: Final = "perturb"  # drawing directions and adding them to the weights
FORWARD: Final = "forward"  # the client half, padding included
ENCODE: Final = "encode"  # frames
RADIO: Final = "radio"  # handing messages over, and waiting for the broker to take them
REPLAY: Final = "replay"  # applying commits
WAIT: Final = "wait"  # everything else
PHASES: Final = (PERTURB, FORWARD, ENCODE, RADIO, REPLAY, WAIT)
COMPUTING: Final = frozenset((PERTURB, FORWARD, ENCODE, REPLAY))


class Stopwatch:
    """Seconds of each phase. One thread enters phases, others may look."""

    def __init__(self, read_s: Callable[[], float]) -> None:
        self._read_s = read_s
        # Replaced as a whole: who looks never sees a half of it.
        self._state = (WAIT, read_s(), dict.fromkeys(PHASES, 0.0))

    def enter(self, phase: str) -> float:
        """Leave the current phase for this one; returns now."""
        now_s = self._read_s()
        current, since_s, seconds = self._state
        self._state = (phase, now_s, seconds | {current: seconds[current] + now_s - since_s})
        return now_s

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase until now."""
        current, since_s, seconds = self._state
        return seconds | {current: seconds[current] + self._read_s() - since_s}
