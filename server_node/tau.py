"""How many steps the server half takes for a device: fixed, or as many as fill the measured slack.

Pure: arrivals and durations in, a number of steps out. Latencies are smoothed like round trips in
TCP (Jacobson, "Congestion avoidance and control", SIGCOMM 1988): mean plus twice the deviation.
Too late a guess costs nothing, because steps beyond the floor end as soon as nobody is awaited.
"""

from __future__ import annotations

from typing import Final

_MEAN_GAIN: Final = 0.25
_DEVIATION_GAIN: Final = 0.25
_DEVIATIONS: Final = 2.0
_STEP_GAIN: Final = 0.1
_RAISE: Final = 1.25


class TauController:
    """Steps per device between `floor` and a cap of at most `cap`, which guards lower and raise.

    Until something was measured it is the floor. With `cap` = `floor`, tau is fixed.
    """

    def __init__(self, floor: int, cap: int) -> None:
        self._floor = floor
        self._highest = self._cap = float(max(floor, cap))
        # Seconds from opening to last frame by device: smoothed mean and deviation.
        self._latencies_s: dict[int, tuple[float, float]] = {}
        self._step_s: float | None = None

    @property
    def adaptive(self) -> bool:
        """False when every device gets the floor whatever is measured."""
        return self._highest > self._floor

    @property
    def cap(self) -> int:
        """No device gets more steps than this now."""
        return int(self._cap)

    def lower(self) -> None:
        """Halve the cap, down to the floor: large tau did harm."""
        self._cap = max(float(self._floor), self._cap / 2.0)

    def raise_(self) -> None:
        """Raise the cap by a quarter, up to the configured one."""
        self._cap = min(self._highest, self._cap * _RAISE)

    def arrived(self, device: int, latency_s: float) -> None:
        """A device's last frame came so long after its round was opened."""
        known = self._latencies_s.get(device)
        if known is None:
            self._latencies_s[device] = latency_s, 0.0
            return
        mean_s, deviation_s = known
        error_s = latency_s - mean_s
        self._latencies_s[device] = (
            mean_s + _MEAN_GAIN * error_s,
            deviation_s + _DEVIATION_GAIN * (abs(error_s) - deviation_s),
        )

    def step_took(self, seconds: float) -> None:
        """One step, of one device or of one in each slot, took so long."""
        if seconds > 0:
            known_s = seconds if self._step_s is None else self._step_s
            self._step_s = known_s + _STEP_GAIN * (seconds - known_s)

    def latency_s(self, device: int) -> float | None:
        """When to expect a device's last frame, after its round's opening; None: never seen."""
        known = self._latencies_s.get(device)
        return None if known is None else known[0] + _DEVIATIONS * known[1]

    def tau(self, done: int, slack_s: float, sharing: int) -> int:
        """Steps of a device that has taken `done`, and fills its part of `slack_s` with more.

        `sharing` devices get equal parts of the slack.
        """
        if self._step_s is None or slack_s <= 0:
            return self._floor
        steps = done + slack_s / self._step_s / sharing
        return int(max(self._floor, min(self._cap, steps)))
