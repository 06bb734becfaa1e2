"""Any power sensor with a hwmon driver: INA219, INA226, INA260 on a shunt, and others.

Devices are known by the `name` of their driver and, where there are several, by the device behind
them ("1-0040": bus 1, address 0x40). The number in hwmon3 changes from boot to boot, and when a
driver is loaded again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from edge_client.errors import MeterError
from edge_client.power.meter import Reading
from edge_client.power.sysfs import read_line, read_number
from wire_protocol.energy import Boundary, Origin

_SHUNT: Final = "data sheet, and 1 % for the shunt"
# Gain error over temperature and that of a usual shunt.
UNCERTAINTY: Final = {
    "ina219": (0.02, _SHUNT),
    "ina226": (0.015, _SHUNT),
    "ina260": (0.005, "data sheet; the shunt is inside"),
}
_OTHER: Final = (0.05, "assumed: no data sheet is known for this driver")
_POWER: Final = re.compile(r"(power\d+)_(?:input|average)")


class HwmonDevice(NamedTuple):
    """One folder hwmonN: the driver's name and what stands behind it."""

    name: str
    device: str
    folder: Path


def hwmon_devices(root: Path) -> Iterator[HwmonDevice]:
    """Every hwmon folder below `root`."""
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = read_line(folder / "name") or read_line(folder / "device" / "name")
        link = folder / "device"
        yield HwmonDevice(name, link.resolve().name if link.exists() else "", folder)


class HwmonMeter:
    """One channel of one hwmon device: power in uW, or voltage in mV times current in mA."""

    def __init__(
        self, root: Path, name: str, *, device: str = "", channel: str = "", rate_hz: float,
        boundary: Boundary = "board-dc", now_s: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`name` is the driver's; `device` and `channel` ("power2") where there are several.

        Raises MeterError when there is none, or more than one.
        """
        self._root = root
        self._wanted = (name, device, channel)
        self._now_s = now_s
        found = self._find()
        self._wanted = (name, found.device, channel)  # after a loss: this one, no other
        relative, source = UNCERTAINTY.get(name, _OTHER)
        files = ", ".join(path.name for path, _ in self._files)
        self.origin = Origin(
            meter=name,
            driver=f"hwmon {name} {found.device}: {files}".replace(" :", ":")[:200],
            boundary=boundary,
            reading="instant",
            rate_hz=rate_hz,
            resolution_w=None,
            uncertainty_relative=relative,
            uncertainty_source=source,
        )

    def read(self) -> Reading:
        """The power now. A sensor that was renumbered is found again. Raises MeterError."""
        try:
            return self._read()
        except MeterError:
            self._find()
            return self._read()

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self) -> Reading:
        begin_s = self._now_s()
        product = 1.0
        for path, unit in self._files:
            product *= read_number(path) * unit
        return Reading((begin_s + self._now_s()) / 2, product)

    def _find(self) -> HwmonDevice:
        name, device, channel = self._wanted
        found = [
            candidate
            for candidate in hwmon_devices(self._root)
            if candidate.name == name and device in ("", candidate.device)
        ]
        if not found:
            raise MeterError(f"{name}: no hwmon device of that name{device and f' at {device}'}")
        if len(found) > 1:
            places = ", ".join(f"hwmon:{name}@{candidate.device}" for candidate in found)
            raise MeterError(f"{name}: {len(found)} of them; name one: {places}")
        self._files = _channel(found[0], channel)
        return found[0]


def power_channels(folder: Path) -> list[str]:
    """The power channels of a device that are connected, e.g. ["power1"]."""
    matches = (_POWER.fullmatch(path.name) for path in folder.iterdir())
    channels = sorted({match[1] for match in matches if match})
    return [name for name in channels if read_line(folder / f"{name}_label").upper() != "NC"]


def _channel(found: HwmonDevice, channel: str) -> list[tuple[Path, float]]:
    """The files whose product is the power, each with its unit in watts, volts or amperes."""
    # The place behind the link names the device: another one that gets this number is not read.
    folder = found.folder.resolve()
    channels = power_channels(folder)
    if channel and channel not in channels:
        raise MeterError(f"{found.name}: no {channel} that is connected; has {channels or 'none'}")
    if len(channels) > 1 and not channel:
        named = ", ".join(
            f"{name} {read_line(folder / f'{name}_label')}".strip() for name in channels
        )
        raise MeterError(
            f"{found.name}: several channels ({named}); name one: hwmon:{found.name}/{channels[0]}"
        )
    for name in [channel] if channel else channels:
        for ending in ("input", "average"):
            path = folder / f"{name}_{ending}"
            if path.exists():
                return [(path, 1e-6)]
    volts, amperes = folder / "in1_input", folder / "curr1_input"
    if volts.exists() and amperes.exists():
        return [(volts, 1e-3), (amperes, 1e-3)]
    raise MeterError(f"{found.name}: has neither power1_input nor in1_input with curr1_input")
