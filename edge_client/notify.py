"""What systemd is told of the device program: ready, and alive (sd_notify, without a library)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

# The watchdog expects one message per period; a second one in it forgives a lost datagram.
_PINGS_PER_PERIOD: Final = 3
_EVERY_S: Final = 10.0


class Notifier:
    """Datagrams to the service manager; silent when nobody started the program as a service."""

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._every_s = min(watchdog_s / _PINGS_PER_PERIOD, _EVERY_S) if watchdog_s else None
        self._pinged_s = 0.0

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Notifier:
        """As NOTIFY_SOCKET and WATCHDOG_USEC say; WATCHDOG_PID may name another process."""
        period = variables.get("WATCHDOG_USEC", "")
        meant = variables.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_s = int(period) / 1e6 if period.isdecimal() and meant else 0.0
        return cls(variables.get("NOTIFY_SOCKET", ""), watchdog_s)

    def ready(self) -> None:
        """The program takes part from now on."""
        self._pinged_s = time.monotonic()
        self._send(b"READY=1")

    def alive(self) -> None:
        """Called often; sends seldom."""
        now_s = time.monotonic()
        if self._every_s is not None and now_s - self._pinged_s >= self._every_s:
            self._pinged_s = now_s
            self._send(b"WATCHDOG=1")

    def _send(self, message: bytes) -> None:
        if not self._address:
            return
        # A service manager that does not listen is no reason to stop training.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.setblocking(False)
            channel.sendto(message, self._address)
