"""What a meter is: something that tells watts, and where they come from."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from wire_protocol.energy import Origin

# What a meter from outside tells above this is no reading of a board.
PLAUSIBLE_W: Final = 1e9


class Reading(NamedTuple):
    """Watts at, or up to, a time of `time.monotonic` (see Origin.reading)."""

    t_s: float
    power_w: float


class Meter(Protocol):
    """A source of readings. Its clock is the sampler's."""

    @property
    def origin(self) -> Origin:
        """Provenance of every reading."""
        ...

    def read(self) -> Reading | None:
        """The newest reading; None when the meter has no new one. Raises MeterError."""
        ...

    def close(self) -> None:
        """Give back files and connections."""
        ...
