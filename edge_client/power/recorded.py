"""A meter's CSV file, after the fact: what a USB meter or a bench supply has recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from edge_client.errors import MeterError
from edge_client.power.columns import find_columns
from edge_client.power.integrate import Trace
from wire_protocol.energy import Boundary, Origin

_MAX_BYTES: Final = 256 << 20


def read_recorded(path: Path, options: Mapping[str, str], boundary: Boundary = "board-dc") -> Trace:
    """The file as a trace on its own clock. Raises MeterError.

    Rows that are no readings, go back in time or repeat one are left out; the trace says so.
    """
    where = str(path)
    if not path.is_file():
        raise MeterError(f"{where}: is no file; give the meter's CSV file")
    if path.stat().st_size > _MAX_BYTES:
        raise MeterError(f"{where}: larger than {_MAX_BYTES >> 20} MiB; cut it")
    times_s: list[float] = []
    powers_w: list[float] = []
    left_out = zeros = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        columns = find_columns(file.readline(), where, options)
        for line in file:
            row = columns.parse(line)
            if row is None or (times_s and row[0] <= times_s[-1]):
                left_out += bool(line.strip())
            elif row[1] <= 0:
                zeros += 1
            else:
                times_s.append(row[0])
                powers_w.append(row[1])
    if len(times_s) < 2:
        raise MeterError(
            f"{where}: fewer than two readings ({left_out} rows are none, {zeros} read 0 W or less)"
        )
    reasons = [f"{left_out} rows are no readings"] if left_out else []
    reasons += [f"{zeros} readings of 0 W or less"] if zeros else []
    return Trace(
        np.array(times_s), np.array(powers_w), csv_origin("recorded", where, boundary),
        ", ".join(reasons),
    )  # fmt: skip


def csv_origin(meter: str, where: str, boundary: Boundary, rate_hz: float = 0.0) -> Origin:
    """The provenance of readings that a device of somebody else's took."""
    return Origin(
        meter=meter,
        driver=where[-200:],
        boundary=boundary,
        reading="instant" if meter == "recorded" else "mean",
        rate_hz=rate_hz,
        resolution_w=None,
        uncertainty_relative=0.02,
        uncertainty_source="assumed: see the meter's data sheet",
    )
