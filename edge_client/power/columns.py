"""Which columns of a meter's CSV hold time and power, by their names and units.

`Time[S],Voltage[V],Current[A]` of a USB meter, `Timestamp(ms),Current(uA)` of an analyser,
`timestamp,power_w` of a script: a name, then a unit in brackets or after an underscore.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from edge_client.errors import MeterError
from edge_client.power.meter import PLAUSIBLE_W

_UNIT: Final = re.compile(r"^(.*?)[\s_]*[\[(/_\s]+\s*([a-zA-Zµμ]+)\s*[\])]?\s*$")
_SCALE: Final = {
    "time": {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "power": {"w": 1.0, "mw": 1e-3, "uw": 1e-6, "µw": 1e-6},
    "voltage": {"v": 1.0, "mv": 1e-3},
    "current": {"a": 1.0, "ma": 1e-3, "ua": 1e-6, "µa": 1e-6},
}
_NAMES: Final = {
    "time": {"time", "timestamp", "t", "elapsed", "date", "datetime"},
    "power": {"power", "watt", "watts", "p", "w"},
    "voltage": {"voltage", "volt", "volts", "u", "v", "vbus"},
    "current": {"current", "ampere", "amperes", "amps", "i", "a", "ibus"},
}
SEPARATORS: Final = ",;\t"
_LATEST_S: Final = 1e15


class Column(NamedTuple):
    """Where a quantity stands in a row, and its unit in seconds, watts, volts or amperes."""

    place: int
    unit: float


class Columns(NamedTuple):
    """How a row becomes a time and a power."""

    separator: str
    time: Column
    power: Column | None
    voltage: Column | None
    current: Column | None
    volts: float | None  # a fixed voltage, for files that have none

    def parse(self, line: str) -> tuple[float, float] | None:
        """(seconds, watts) of a row; None when it is not one."""
        cells = [cell.strip().strip('"') for cell in line.split(self.separator)]
        try:
            time_s = _seconds(cells[self.time.place]) * self.time.unit
            if self.power is not None:
                power_w = _cell(cells, self.power)
            else:
                assert self.current is not None
                volts = _cell(cells, self.voltage) if self.voltage else (self.volts or 0.0)
                power_w = _cell(cells, self.current) * volts
        except (ValueError, IndexError, OverflowError, OSError):  # years that no clock has, too
            return None
        plausible = abs(time_s) < _LATEST_S and abs(power_w) < PLAUSIBLE_W  # nan is not
        return (time_s, power_w) if plausible else None


def find_columns(header: str, where: str, options: Mapping[str, str]) -> Columns:
    """The columns of a header line. Raises MeterError that names what is missing.

    `options` may name columns as they stand in the header (time, power, voltage, current) and give
    the voltage of a file without one (volts).
    """
    separator = max(SEPARATORS, key=header.count)
    names = [cell.strip().strip('"\ufeff') for cell in header.split(separator)]
    found = {what: _find(names, what, options.get(what, ""), where) for what in _NAMES}
    volts = _volts(options.get("volts", ""), where)
    time, power, current = found["time"], found["power"], found["current"]
    if time is None:
        raise MeterError(f"{where}: no column of times in {names}; name it: ?time=COLUMN")
    if power is None and current is None:
        raise MeterError(f"{where}: neither power nor current in {names}; name it: ?power=COLUMN")
    if power is None and found["voltage"] is None and volts is None:
        raise MeterError(f"{where}: currents without a voltage; give it: ?volts=5.1")
    return Columns(separator, time, power, found["voltage"], current, volts)


def _find(names: Sequence[str], what: str, named: str, where: str) -> Column | None:
    if named and named not in names:
        raise MeterError(f"{where}: no column {named!r}; the header has {list(names)}")
    for index, name in enumerate(names):
        match = _UNIT.match(name)
        word, unit = (match[1], match[2].lower()) if match else (name, "")
        word, unit = word.strip().lower(), unit.replace("μ", "µ")
        scale = _SCALE[what].get(unit)
        if name == named:
            return Column(index, 1.0 if scale is None else scale)
        if not named and word in _NAMES[what] and scale is not None:
            return Column(index, scale)
        if not named and name.lower() in _NAMES[what]:
            return Column(index, 1.0)
    return None


def _volts(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        volts = float(text)
    except ValueError:
        volts = math.nan
    if not 0 < volts < 1000:
        raise MeterError(f"{where}: volts={text}: give the supply's voltage, e.g. volts=5.1")
    return volts


def _cell(cells: Sequence[str], column: Column) -> float:
    return float(cells[column.place]) * column.unit


def _seconds(text: str) -> float:
    """A number, or a date and time of ISO 8601 as Unix time."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()
