"""Which meter is here: the one that is named, or the first that is found; by name, not number."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from edge_client.errors import MeterError
from edge_client.power.columns import find_columns
from edge_client.power.hwmon import HwmonMeter, hwmon_devices, power_channels
from edge_client.power.jetson import JetsonMeter
from edge_client.power.lines import LineMeter, open_growing, parse_line
from edge_client.power.local import local_address, open_serial, open_tcp
from edge_client.power.meter import Meter
from edge_client.power.plug import HttpPlug, MqttPlug
from edge_client.power.pmic import PmicMeter
from edge_client.power.rapl import RaplMeter
from edge_client.power.recorded import csv_origin
from edge_client.power.sampler import RATE_HZ
from edge_client.power.spec import FOUND_HERE, MeterSpec, parse_spec
from firmware_profiles.schema import Profile
from wire_protocol.energy import NoEnergy

_PLUG_HZ: Final = 1.0  # plugs renew their figure about once a second
_BROKER_S: Final = 5.0


class MeterOptions(NamedTuple):
    """How a meter is chosen; `spec` is parsed by edge_client.power.spec."""

    spec: str = "auto"
    rate_hz: float | None = None  # None: as fast as the kind of meter is worth asking


class Finding(NamedTuple):
    """One kind of meter, and what became of looking for it here."""

    kind: str
    usable: bool
    detail: str  # what would be read, or why it cannot be


def find_meter(
    options: MeterOptions, profile: Profile | None = None, root: Path = Path("/")
) -> Meter | NoEnergy:
    """The meter, or why there is none.

    A meter that was named and cannot be read raises MeterError. With "auto", the kinds that the
    profile lists are tried in its order, else all; meters outside the board have to be named.
    """
    spec = parse_spec(options.spec)
    if spec.kind in ("model", "none"):
        return NoEnergy(f"no meter asked for (--meter {spec.kind})")
    if spec.kind != "auto":
        return open_meter(spec, options.rate_hz, root)
    reasons: list[str] = []
    for kind in _kinds(profile):
        try:
            return open_meter(MeterSpec(kind, "", {}), options.rate_hz, root)
        except MeterError as error:
            reasons.append(str(error))
    telling = [
        reason for reason in reasons if any(word in reason for word in ("permission", "name one"))
    ]
    return NoEnergy(f"no power sensor found: {'; '.join(telling or reasons)}"[:400])


def survey(profile: Profile | None, root: Path = Path("/")) -> Iterator[Finding]:
    """Every kind of meter that can be found without being named, and other hwmon sensors."""
    for kind in _kinds(profile):
        try:
            meter = open_meter(MeterSpec(kind, "", {}), None, root)
        except MeterError as error:
            yield Finding(kind, usable=False, detail=str(error))
        else:
            yield Finding(kind, usable=True, detail=meter.origin.driver)
            meter.close()
    for device in hwmon_devices(root):
        if device.name not in FOUND_HERE and (channels := power_channels(device.folder)):
            named = f"--meter hwmon:{device.name}@{device.device}/{channels[0]}"
            yield Finding("hwmon", usable=True, detail=f"{device.name}: {named}")


def open_meter(spec: MeterSpec, rate_hz: float | None, root: Path = Path("/")) -> Meter:
    """The meter of this kind. Raises MeterError."""
    return _OPENERS[spec.kind](spec, rate_hz, root)


def _kinds(profile: Profile | None) -> list[str]:
    if profile is None:
        return list(FOUND_HERE)
    return [kind for kind in profile.power.sensors if kind in FOUND_HERE]


def _pmic(_spec: MeterSpec, rate_hz: float | None, _root: Path) -> Meter:
    return PmicMeter(rate_hz=rate_hz or RATE_HZ)


def _jetson(_spec: MeterSpec, rate_hz: float | None, root: Path) -> Meter:
    return JetsonMeter(root, rate_hz=rate_hz or RATE_HZ)


def _rapl(_spec: MeterSpec, rate_hz: float | None, root: Path) -> Meter:
    return RaplMeter(root, rate_hz=rate_hz or RATE_HZ)


def _hwmon(spec: MeterSpec, rate_hz: float | None, root: Path) -> Meter:
    """hwmon:NAME[@DEVICE][/CHANNEL]; ina226[:DEVICE] is short for hwmon:ina226@DEVICE."""
    if spec.kind == "hwmon":
        rest, _, channel = spec.argument.partition("/")
        name, _, device = rest.partition("@")
    else:
        name, device, channel = spec.kind, spec.argument, ""
    return HwmonMeter(root, name, device=device, channel=channel, rate_hz=rate_hz or RATE_HZ)


def _csv(spec: MeterSpec, rate_hz: float | None, _root: Path) -> Meter:
    handle, header = open_growing(Path(spec.argument))
    try:
        columns = find_columns(header, spec.argument, spec.options)
    except MeterError:
        os.close(handle)
        raise
    origin = csv_origin(spec.kind, spec.argument, "board-dc", rate_hz or RATE_HZ)
    return LineMeter(handle, columns.parse, origin, ends=False)


def _lines(spec: MeterSpec, rate_hz: float | None, _root: Path) -> Meter:
    """lines:tcp://HOST:PORT, lines:/dev/ttyUSB0 or lines:stdin."""
    where = spec.argument
    if where == "stdin":
        handle = os.dup(sys.stdin.fileno())
        os.set_blocking(handle, False)
    elif where.startswith("tcp://"):
        host, _, port = where.removeprefix("tcp://").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise MeterError(f"meter lines:{where}: write lines:tcp://HOST:PORT")
        handle = open_tcp(host.strip("[]"), int(port))
    elif where.startswith("/dev/"):
        baud = spec.options.get("baud", "115200")
        handle = open_serial(where, int(baud) if baud.isdecimal() else 0)
    else:
        raise MeterError(f"meter lines:{where}: write tcp://HOST:PORT, a /dev/.. path, or stdin")
    return LineMeter(handle, parse_line, csv_origin("lines", where, "board-dc", rate_hz or RATE_HZ))


def _plug_http(spec: MeterSpec, rate_hz: float | None, _root: Path) -> Meter:
    return HttpPlug(spec.argument, rate_hz=rate_hz or _PLUG_HZ)


def _plug_mqtt(spec: MeterSpec, rate_hz: float | None, _root: Path) -> Meter:
    """plug-mqtt:HOST[:PORT]/TOPIC[#FIELD]; the broker is the plug's, in the lab's network."""
    from wire_protocol.mqtt import DEFAULT_PORT, Address, Link  # noqa: PLC0415  # paho, only here

    rest, _, field = spec.argument.partition("#")
    place, _, topic = rest.partition("/")
    host, _, port = place.partition(":")
    if not topic or (port and not port.isdecimal()):
        raise MeterError(f"meter plug-mqtt:{spec.argument}: write HOST[:PORT]/TOPIC[#FIELD]")
    address = Address(*local_address(host, int(port or DEFAULT_PORT)))
    link = Link(f"musplit-meter-{os.getpid()}", address, subscriptions=(topic,))
    link.open(_BROKER_S)
    return MqttPlug(link, topic, field, rate_hz=rate_hz or _PLUG_HZ)


_OPENERS: Final[dict[str, Callable[[MeterSpec, float | None, Path], Meter]]] = {
    "pmic": _pmic,
    "ina219": _hwmon,
    "ina226": _hwmon,
    "ina260": _hwmon,
    "hwmon": _hwmon,
    "ina3221": _jetson,
    "rapl": _rapl,
    "usb-csv": _csv,
    "bench-csv": _csv,
    "lines": _lines,
    "plug-http": _plug_http,
    "plug-mqtt": _plug_mqtt,
}
