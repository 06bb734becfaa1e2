"""The embedded broker: mosquitto when it is on PATH, otherwise amqtt (pure Python).

Loopback only, unless it is given certificates and access list of the lab's authority, or the user
types --insecure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from emulation.errors import ListenError
from emulation.processes import last_line, processes
from identity.access import ACL_FILE, CRL_FILE, Listener, mosquitto_configuration
from identity.files import BROKER_KEY_FILE
from wire_protocol.messages import printable
from wire_protocol.mqtt import Address
from wire_protocol.tls import check_private

LOOPBACK: Final = "127.0.0.1"
_START_S: Final = 15.0
_POLL_S: Final = 0.2


def check_listen(address: Address, tls: Path | None, *, insecure: bool) -> None:
    """Raise ListenError when the address is beyond loopback without TLS or consent, or taken.

    Raises IdentityError when others can read the broker's key.
    """
    if tls is not None and insecure:
        raise ListenError("--insecure and --tls exclude each other: give one")
    if not address.is_loopback and tls is None and not insecure:
        raise ListenError(
            f"--listen {address}: without certificates anyone who reaches it can join; give --tls "
            "DIR (musplit ca broker-config writes it), or type --insecure on a network you trust"
        )
    if tls is not None and not (tls / ACL_FILE).is_file():
        raise ListenError(f"--tls {tls}: no broker's folder; musplit ca broker-config writes one")
    if tls is not None:
        check_private(tls / BROKER_KEY_FILE)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ListenError(
                f"--listen {address}: cannot listen there ({error.strerror}); is another broker "
                "running? Give another --listen HOST:PORT"
            ) from error


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def run_broker(
    address: Address, say: Callable[[str], None], max_packet_bytes: int = 0, tls: Path | None = None
) -> int:  # fmt: skip
    """Run a broker in the foreground until interrupted; returns its exit code.

    Packets above `max_packet_bytes` end their connection (0: room for the largest frame). `tls` is
    a folder of `musplit ca broker-config`; its lists are read again when they change.
    """
    mosquitto = shutil.which("mosquitto")
    for option, given in (("--max-packet", max_packet_bytes), ("--tls", tls)):
        if mosquitto is None and given:
            raise ListenError(f"{option}: amqtt cannot do it; install mosquitto")
    if mosquitto is None:
        say(f"amqtt (MQTT 3.1.1) listening on {address}")
        asyncio.run(_run_amqtt(address))
        return 0
    with tempfile.TemporaryDirectory(prefix="musplit-broker-") as folder, processes() as group:
        configuration = Path(folder) / "mosquitto.conf"
        listener = Listener(address.host, address.port, tls, max_packet_bytes)
        text = mosquitto_configuration(listener)
        if tls is not None and os.geteuid() == 0:
            text += "user root\n"  # else it becomes a user who cannot read the key
        configuration.write_text(text, encoding="utf-8")
        log = Path(folder) / "mosquitto.log"
        process = group.start([mosquitto, "-c", str(configuration)], log)
        if not wait_for_broker(address, _START_S, lambda: process.poll() is None):
            raise ListenError(f"mosquitto does not listen on {address}: {last_line(log)}")
        say(f"mosquitto (MQTT 5{', TLS 1.3' if tls else ''}) listening on {address}")
        lists = _Watched(tls)
        told = 0
        while process.poll() is None:
            time.sleep(_POLL_S)
            if lists.changed():
                process.send_signal(signal.SIGHUP)
                say("access list and revocation list read again")
            if tls is not None:
                told = _tell(log, told, say)
        return process.returncode or 1


class _Watched:
    """The lists in a broker's folder, and whether they were written again."""

    def __init__(self, folder: Path | None) -> None:
        self._files = [] if folder is None else [folder / ACL_FILE, folder / CRL_FILE]
        self._seen = self._stamps()

    def changed(self) -> bool:
        """True once after each change."""
        now = self._stamps()
        changed, self._seen = now != self._seen, now
        return changed

    def _stamps(self) -> list[int]:
        return [file.stat().st_mtime_ns if file.exists() else 0 for file in self._files]


def _tell(log: Path, told: int, say: Callable[[str], None]) -> int:
    """Pass on what the broker says of refused connections; returns how far the log was told."""
    with log.open("rb") as file:
        file.seek(told)
        for line in file:
            if not line.endswith(b"\n"):
                break
            told += len(line)
            say(printable(line.decode(errors="replace").strip()))  # a stranger's words, some
    return told


def wait_for_broker(address: Address, timeout_s: float, alive: Callable[[], bool]) -> bool:
    """True once something accepts connections at `address`."""
    deadline_s = time.monotonic() + timeout_s
    while alive() and time.monotonic() < deadline_s:
        try:
            with socket.create_connection(address, timeout=1.0):
                return True
        except OSError:
            time.sleep(0.05)
    return False


async def _run_amqtt(address: Address) -> None:
    from amqtt.broker import Broker  # noqa: PLC0415 - not needed where mosquitto is

    logging.getLogger("amqtt").setLevel(logging.ERROR)
    logging.getLogger("transitions").setLevel(logging.ERROR)
    host = f"[{address.host}]" if ":" in address.host else address.host
    settings: dict[str, Any] = {
        "listeners": {"default": {"type": "tcp", "bind": f"{host}:{address.port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    broker = Broker(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await broker.start()
    await stop.wait()
    await broker.shutdown()
