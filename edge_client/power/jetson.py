"""The INA3221 of Jetson boards: three rails a chip, several chips, two generations of drivers.

JetPack 5 and later: hwmon of the upstream driver, inN_label, inN_input (mV), currN_input (mA).
JetPack 4: an IIO device with rail_name_N and in_powerN_input (mW).
Where a rail carries the whole input, it is the total by itself: the other rails are fed from it,
and adding them would count their power twice. Otherwise the total is the sum of the rails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from edge_client.errors import MeterError
from edge_client.power.meter import Reading
from edge_client.power.sysfs import read_line, read_number
from wire_protocol.energy import Origin

# Rails that carry all there is.
INPUTS: Final = ("VDD_IN", "POM_5V_IN")
_CHANNELS: Final = 3  # of the chip; the driver's further channels are shunt voltages and sums


class Rail(NamedTuple):
    """One rail; the product of its files is its power in watts."""

    label: str
    files: tuple[tuple[Path, float], ...]


class JetsonMeter:
    """The board's or, without an input rail, the processor's total."""

    def __init__(
        self, root: Path, *, rate_hz: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises MeterError when no rail is found."""
        self._root = root
        self._now_s = now_s
        self._rails = self._find()
        labels = [rail.label for rail in self._rails]
        whole = labels[0] in INPUTS
        self.origin = Origin(
            meter="ina3221",
            driver=f"ina3221: {' + '.join(labels)}"[:200],
            boundary="board-dc" if whole else "soc-rails",
            reading="instant",
            rate_hz=rate_hz,
            resolution_w=None,
            uncertainty_relative=0.05,
            uncertainty_source="assumed: the boards' shunts are not calibrated",
        )
        self._labels = labels

    def read(self) -> Reading:
        """The total now; after a loss the same rails are looked for again. Raises MeterError."""
        try:
            return self._read()
        except MeterError:
            rails = self._find()
            if [rail.label for rail in rails] != self._labels:
                raise
            self._rails = rails
            return self._read()

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self) -> Reading:
        begin_s = self._now_s()
        total_w = 0.0
        for rail in self._rails:
            product = 1.0
            for path, unit in rail.files:
                product *= read_number(path) * unit
            total_w += product
        return Reading((begin_s + self._now_s()) / 2, total_w)

    def _find(self) -> list[Rail]:
        rails = {rail.label: rail for rail in jetson_rails(self._root)}
        if not rails:
            raise MeterError("ina3221: no rail that is connected, of either driver generation")
        for label in INPUTS:
            if label in rails:
                return [rails[label]]
        return [rails[label] for label in sorted(rails)]


def jetson_rails(root: Path) -> Iterator[Rail]:
    """Every connected rail; a chip that two drivers show counts once, by its labels."""
    bus = root / "sys/bus/i2c/devices"
    for folder in sorted(bus.glob("*/hwmon/hwmon*")):
        if "ina3221" in read_line(folder / "name"):
            yield from _hwmon_rails(folder)
    for folder in sorted(bus.glob("*/iio:device*")):
        yield from _iio_rails(folder)


def _hwmon_rails(folder: Path) -> Iterator[Rail]:
    for channel in range(1, _CHANNELS + 1):
        label = read_line(folder / f"in{channel}_label")
        volts, amperes = folder / f"in{channel}_input", folder / f"curr{channel}_input"
        if _connected(label) and volts.exists() and amperes.exists():
            yield Rail(label, ((volts, 1e-3), (amperes, 1e-3)))


def _iio_rails(folder: Path) -> Iterator[Rail]:
    for channel in range(_CHANNELS):
        label = read_line(folder / f"rail_name_{channel}")
        milliwatts = folder / f"in_power{channel}_input"
        if _connected(label) and milliwatts.exists():
            yield Rail(label, ((milliwatts, 1e-3),))


def _connected(label: str) -> bool:
    return bool(label) and label.upper() != "NC"
