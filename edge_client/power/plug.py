"""Smart plugs: the power at the wall, asked for by HTTP or told by MQTT, as JSON or as a number."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from edge_client.errors import MeterError
from edge_client.power.local import http_get, local_address
from edge_client.power.meter import PLAUSIBLE_W, Reading
from wire_protocol.energy import Origin
from wire_protocol.events import LinkLike, Received

_TIMEOUT_S: Final = 1.0


class PlugModel(NamedTuple):
    """Where a make of plugs tells its power: the path to ask for, and the field of its JSON."""

    path: str
    field: str


# As the makers document it.
MODELS: Final = {
    "shelly1": PlugModel("/meter/0", "power"),
    "shelly2": PlugModel("/rpc/Switch.GetStatus?id=0", "apower"),
    "tasmota": PlugModel("/cm?cmnd=Status%208", "StatusSNS.ENERGY.Power"),
}


class PlugLink(LinkLike, Protocol):
    """A link of the meter's own."""

    def close(self) -> None:
        """Disconnect."""
        ...


class HttpPlug:
    """A plug that is asked at every reading; what it tells changes about once a second."""

    def __init__(
        self, where: str, *, rate_hz: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """`where` is MODEL@HOST[:PORT], or http://HOST[:PORT]/PATH#FIELD. Raises MeterError."""
        self._now_s = now_s
        name, at, rest = where.partition("@")
        if at and name in MODELS:
            url = f"http://{rest}{MODELS[name].path}#{MODELS[name].field}"
        else:
            url = where
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError:  # brackets that do not close, ports that are none
            parts, port = urlsplit(""), 0
        if parts.scheme != "http" or not parts.hostname or not where.isascii() or " " in where:
            raise MeterError(
                f"plug {where!r}: write http://HOST/PATH#FIELD or one of "
                f"{', '.join(f'{model}@HOST' for model in MODELS)}"
            )
        self._host = parts.hostname
        self._address = local_address(parts.hostname, port)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._field = unquote(parts.fragment)
        self.origin = plug_origin("plug-http", f"http://{self._host}{self._path}", rate_hz)
        self._ask()

    def read(self) -> Reading:
        """The power now. Raises MeterError."""
        begin_s = self._now_s()
        power_w = self._ask()
        return Reading((begin_s + self._now_s()) / 2, power_w)

    def close(self) -> None:
        """Nothing is held open."""

    def _ask(self) -> float:
        body = http_get(self._address, self._host, self._path, _TIMEOUT_S)
        return watts(body, self._field, self.origin.driver)


class MqttPlug:
    """A plug that publishes its power on a topic; `link` is subscribed to it."""

    def __init__(
        self, link: PlugLink, topic: str, field: str, *, rate_hz: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._link = link
        self._field = field
        self._now_s = now_s
        self.origin = plug_origin("plug-mqtt", topic, rate_hz)

    def read(self) -> Reading | None:
        """The newest message's power; None when none came. Raises MeterError."""
        payload: bytes | None = None
        while (event := self._link.next_event(0.0)) is not None:
            if isinstance(event, Received):
                payload = bytes(event.payload)
        if payload is None:
            return None
        return Reading(self._now_s(), watts(payload, self._field, self.origin.driver))

    def close(self) -> None:
        """Leave the broker."""
        self._link.close()


def plug_origin(meter: str, where: str, rate_hz: float) -> Origin:
    """The provenance of a plug's readings."""
    return Origin(
        meter=meter,
        driver=where[-200:],
        boundary="wall-ac",
        reading="instant",
        rate_hz=rate_hz,
        resolution_w=None,
        uncertainty_relative=0.02,
        uncertainty_source="assumed: see the plug's data sheet; below 5 W it is larger",
    )


def watts(payload: bytes, field: str, where: str) -> float:
    """The number in a plug's answer; `field` is a path of keys, "a.b.0", empty: the whole answer.

    Raises MeterError.
    """
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise MeterError(f"{where}: answered {payload[:40]!r}, no JSON") from error
    for key in field.split(".") if field else ():
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise MeterError(f"{where}: no field {field!r} in the answer")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < PLAUSIBLE_W:  # nan, and integers of a thousand digits
        raise MeterError(f"{where}: {field or 'the answer'} is no number of watts")
    return float(value)
