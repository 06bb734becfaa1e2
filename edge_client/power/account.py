"""The energy of a run by phase, added up while it goes: memory does not grow with the run.

A meter tells the power ten times a second, the program changes its phase a thousand times. The
energy between two readings is shared by the seconds that each phase had in between.
"""

from __future__ import annotations

import math
import threading

from edge_client.power.integrate import GAP_LIMIT
from edge_client.power.meter import Reading
from edge_client.power.phases import PHASES, Stopwatch
from wire_protocol.energy import MeasuredByPhase, NoEnergy, Origin


class Account:
    """Readings in, by the sampler's thread; records out, by the program's."""

    def __init__(self, origin: Origin, stopwatch: Stopwatch, idle_w: float | None) -> None:
        self._origin = origin
        self._stopwatch = stopwatch
        self._idle_w = idle_w
        self._lock = threading.Lock()
        self._last: Reading | None = None
        self.begin(0.0)

    def begin(self, now_s: float) -> None:
        """Start a run at zero."""
        with self._lock:
            self._begin_s = now_s
            self._seconds = self._stopwatch.seconds()
            self._joules = dict.fromkeys(PHASES, 0.0)
            self._jumps_j2 = 0.0
            self._samples = 0
            self._largest_gap_s = self._gap_s = 0.0

    def take(self, reading: Reading) -> None:
        """Add the energy since the reading before, or since the run began."""
        with self._lock:
            last, self._last = self._last or reading, reading
            seconds = self._stopwatch.seconds()
            before, self._seconds = self._seconds, seconds
            span_s = reading.t_s - (
                max(last.t_s, self._begin_s) if self._samples else self._begin_s
            )
            passed_s = sum(seconds.values()) - sum(before.values())
            if span_s <= 0 or passed_s <= 0:
                return
            mean_w, jump_w = reading.power_w, 0.0
            if self._origin.reading == "instant":
                mean_w = (last.power_w + reading.power_w) / 2
                jump_w = reading.power_w - last.power_w
            for phase in PHASES:
                share = (seconds[phase] - before[phase]) / passed_s
                self._joules[phase] += mean_w * span_s * share
            self._jumps_j2 += (span_s * jump_w) ** 2 / 12.0
            self._samples += 1
            self._gap_s = max(self._gap_s, span_s)
            self._largest_gap_s = max(self._largest_gap_s, span_s)

    def so_far(self, now_s: float, reason: str) -> MeasuredByPhase | NoEnergy:
        """The run until its last reading; `reason` is why readings are missing, if some are."""
        with self._lock:
            last, gap_s = self._last, self._gap_s
            self._gap_s = 0.0
            why = f": {reason}" if reason else ""
            if last is None or not self._samples:
                return NoEnergy(f"no reading of {self._origin.meter} in this run yet{why}"[:400])
            window_s = last.t_s - self._begin_s
            open_s = now_s - last.t_s
            worst_s = max(self._largest_gap_s, open_s)
            if worst_s > GAP_LIMIT * (window_s + open_s):
                return NoEnergy(
                    f"{worst_s:.2f} s without a reading of {self._origin.meter} in "
                    f"{window_s + open_s:.2f} s{why}"[:400]
                )
            energy_j = sum(self._joules.values())
            meter_j = energy_j * self._origin.uncertainty_relative
            return MeasuredByPhase(
                energy_j=energy_j,
                **{f"{phase}_energy_j": joules for phase, joules in self._joules.items()},
                idle_w=self._idle_w,
                uncertainty_j=math.hypot(meter_j, 2.0 * math.sqrt(self._jumps_j2)),
                window_s=window_s,
                samples=self._samples,
                largest_gap_s=self._largest_gap_s,
                gap_s=max(gap_s, open_s),
                origin=self._origin,
            )
