"""The agent's clocks: how long nothing was heard, and when to ask again."""

from __future__ import annotations

import time
from typing import Final

from wire_protocol.errors import StalledError, TransportError

# Silence after which the last request is repeated.
REPEAT_S: Final = 5.0


class Watch:
    """Of one agent; seconds are those of time.monotonic."""

    def __init__(self, fleet: str, wait_s: float, offline_s: float) -> None:
        self._fleet, self._wait_s, self._offline_s = fleet, wait_s, offline_s
        self._heard_s = self._answered_s = time.monotonic()
        self._offline_since_s: float | None = None

    @property
    def online(self) -> bool:
        """True while there is a connection to the broker."""
        return self._offline_since_s is None

    def connected(self) -> None:
        """The broker is there; nobody could be heard before."""
        self._offline_since_s = None
        self._heard_s = time.monotonic()

    def lost(self) -> None:
        """The connection is gone."""
        self._offline_since_s = self._offline_since_s or time.monotonic()

    def heard(self, *, answer: bool = True) -> None:
        """The server lives; `answer`: what was asked for last need not be repeated yet."""
        self._heard_s = time.monotonic()
        if answer:
            self._answered_s = self._heard_s

    def busy_sending(self) -> None:
        """What was asked for is still on its way to the broker: no answer is due yet."""
        self._answered_s = time.monotonic()

    def check(self) -> None:
        """Raises TransportError without a broker, StalledError without a server, for too long."""
        now_s = time.monotonic()
        if self._offline_since_s is not None:
            if now_s - self._offline_since_s > self._offline_s:
                raise TransportError(
                    f"broker lost for {self._offline_s:.0f} s; start again once it is back"
                )
        elif now_s - self._heard_s > self._wait_s:
            raise StalledError(
                f"nothing heard from a server of fleet {self._fleet!r} for {self._wait_s:.0f} s; "
                "is `musplit serve` running on this broker?"
            )

    def repeat_due(self, since_s: float | None = None) -> bool:
        """Whether to ask again; `since_s`: the last progress, if it is not the last answer.

        Once true, it is false for as long again, but for a progress of the caller's own.
        """
        now_s = time.monotonic()
        last_s = self._answered_s if since_s is None else since_s
        if not self.online or now_s - last_s <= REPEAT_S:
            return False
        self._answered_s = now_s
        return True
