"""From readings to joules: trapezoid, interpolated at the window's edges."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import GapError
from wire_protocol.energy import EnergyMeasured, Origin

# A window with a longer hole between two readings, as a part of it, has no energy.
GAP_LIMIT: Final = 0.1

Vector = NDArray[np.float64]


class Trace(NamedTuple):
    """Readings of one meter: times (n,) in seconds, strictly ascending, and watts (n,)."""

    times_s: Vector
    powers_w: Vector
    origin: Origin
    reason: str = ""  # why readings are missing, where some are


def integrate(
    trace: Trace, begin_s: float, end_s: float, idle_w: float | None = None
) -> EnergyMeasured:
    """The energy between two times of the trace's clock.

    Readings of the kind "instant" are joined by straight lines, those of the kind "mean" hold back
    to the reading before. `idle_w` is what the board draws when it does nothing. The uncertainty,
    coverage factor 2, is the meter's own and, for a jump of the power between two readings, that
    of the moment of the jump. Raises GapError when a gap exceeds 10 % of the window.
    """
    window_s = end_s - begin_s
    inside = slice(
        int(np.searchsorted(trace.times_s, begin_s, "left")),
        int(np.searchsorted(trace.times_s, end_s, "right")),
    )
    largest_gap_s = check_gaps(trace, inside, begin_s, end_s)
    energy_j, jump_j = _instant(trace, inside, begin_s, end_s)
    if trace.origin.reading == "mean":
        energy_j = _mean(trace, begin_s, end_s)
        jump_j = 0.0
    samples = inside.stop - inside.start
    meter_j = abs(energy_j) * trace.origin.uncertainty_relative
    return EnergyMeasured(
        energy_j=energy_j,
        net_j=None if idle_w is None else energy_j - idle_w * window_s,
        idle_w=idle_w,
        uncertainty_j=math.hypot(meter_j, 2.0 * jump_j),
        window_s=window_s,
        samples=samples,
        rate_hz=samples / window_s,
        largest_gap_s=largest_gap_s,
        origin=trace.origin,
    )


def check_gaps(trace: Trace, inside: slice, begin_s: float, end_s: float) -> float:
    """The longest time without a reading around or in the window. Raises GapError."""
    why = f" ({trace.reason})" if trace.reason else ""
    window_s = end_s - begin_s
    if window_s <= 0:
        raise GapError(f"energy: a window of {window_s:.3f} s is none")
    if inside.stop - inside.start < 2:
        count = inside.stop - inside.start
        raise GapError(f"energy: {count} readings of {trace.origin.meter} in {window_s:.2f} s{why}")
    around = trace.times_s[max(0, inside.start - 1) : inside.stop + 1]
    bounds = np.concatenate(([min(begin_s, around[0])], around, [max(end_s, around[-1])]))
    largest_gap_s = float(np.diff(bounds).max())
    if largest_gap_s > GAP_LIMIT * window_s:
        raise GapError(
            f"energy: {largest_gap_s:.2f} s without a reading of {trace.origin.meter} in a window "
            f"of {window_s:.2f} s, more than {GAP_LIMIT:.0%} of it{why}"
        )
    return largest_gap_s


def _instant(trace: Trace, inside: slice, begin_s: float, end_s: float) -> tuple[float, float]:
    """Joules by the trapezoid, and the standard uncertainty from jumps between readings."""
    times_s = np.concatenate(([begin_s], trace.times_s[inside], [end_s]))
    powers_w = np.interp(times_s, trace.times_s, trace.powers_w)
    steps_s, jumps_w = np.diff(times_s), np.diff(powers_w)
    # The moment of a jump is uniform in its interval: a variance of (jump * step)^2 / 12.
    jump_j = math.sqrt(float(np.sum((steps_s * jumps_w) ** 2)) / 12.0)
    return float(np.trapezoid(powers_w, times_s)), jump_j


def _mean(trace: Trace, begin_s: float, end_s: float) -> float:
    """Joules of readings that are means since the reading before: exact between readings."""
    times_s = np.concatenate(([min(begin_s, trace.times_s[0])], trace.times_s))
    joules = np.concatenate(([0.0], np.cumsum(np.diff(times_s) * trace.powers_w)))
    after_s = max(0.0, end_s - trace.times_s[-1])
    edges_j = np.interp([begin_s, end_s], times_s, joules)
    return float(edges_j[1] - edges_j[0] + after_s * trace.powers_w[-1])
