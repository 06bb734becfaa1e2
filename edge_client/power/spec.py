"""How a meter is named: KIND, KIND:ARGUMENT or KIND:ARGUMENT?KEY=VALUE&KEY=VALUE."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from edge_client.errors import MeterError

# Beside these: auto, model, none.
FOUND_HERE: Final = ("pmic", "ina260", "ina226", "ina219", "ina3221", "rapl")
GIVEN: Final = ("hwmon", "usb-csv", "bench-csv", "lines", "plug-http", "plug-mqtt")
_COLUMNS: Final = {"time", "power", "voltage", "current", "volts"}
_KEYS: Final = {
    "usb-csv": _COLUMNS,
    "bench-csv": _COLUMNS,
    "recorded": _COLUMNS,
    "lines": {"baud"},
}


class MeterSpec(NamedTuple):
    """A meter as it was named."""

    kind: str
    argument: str
    options: dict[str, str]


def parse_spec(text: str) -> MeterSpec:
    """Raises MeterError."""
    kind, _, argument = text.partition(":")
    known = ("auto", "model", "none", *FOUND_HERE, *GIVEN)
    if kind not in known:
        raise MeterError(f"meter {text!r}: no such kind; write one of {', '.join(known)}")
    options: dict[str, str] = {}
    if kind in _KEYS:
        argument, options = split_options(argument, kind)
    if kind in GIVEN and not argument:
        raise MeterError(f"meter {text!r}: {kind} needs an argument, {kind}:..; see docs/energy.md")
    return MeterSpec(kind, argument, options)


def split_options(argument: str, kind: str) -> tuple[str, dict[str, str]]:
    """ARGUMENT?KEY=VALUE&KEY=VALUE in its parts. Raises MeterError for a key that is none."""
    place, _, query = argument.partition("?")
    options = dict(parse_qsl(query))
    if unknown := set(options) - _KEYS[kind]:
        raise MeterError(
            f"meter {argument!r}: unknown {', '.join(sorted(unknown))}; {kind} takes "
            f"{', '.join(sorted(_KEYS[kind]))}"
        )
    return place, options
