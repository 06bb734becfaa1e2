"""What a link to a broker takes and gives: its address, its will, its events."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple, Protocol

from wire_protocol.mqtt_stream import Payload


class Address(NamedTuple):
    """Where a broker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True when no other machine can be there."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Connected(NamedTuple):
    """The link is up and subscribed (again)."""


class Disconnected(NamedTuple):
    """The link is down; it reconnects by itself unless `fatal` says why it cannot."""

    reason: str
    fatal: bool


class Received(NamedTuple):
    """A message on one of the subscribed topics."""

    topic: str
    payload: Payload


LinkEvent = Connected | Disconnected | Received


class Will(NamedTuple):
    """What the broker publishes for us when the connection is lost."""

    topic: str
    payload: bytes


class LinkLike(Protocol):
    """What agents and drivers need of a link; tests and the in-process fleet bring their own."""

    @property
    def bytes_up(self) -> int:
        """Bytes written to the stream so far."""
        ...

    @property
    def bytes_down(self) -> int:
        """Bytes read from the stream so far."""
        ...

    @property
    def backlog(self) -> int:
        """Messages that the broker has not acknowledged."""
        ...

    def publish(self, topic: str, payload: bytes) -> None:
        """Queue a message."""
        ...

    def next_event(self, timeout_s: float) -> LinkEvent | None:
        """The next event, or None after `timeout_s`."""
        ...
