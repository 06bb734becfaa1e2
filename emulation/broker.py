"""The embedded broker: mosquitto when it is on PATH, otherwise amqtt (pure Python).

Loopback only, unless the user names another address and types --insecure: neither broker is given
passwords or TLS here.
"""

from __future__ import annotations

import asyncio
import logging
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
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.mqtt import Address

LOOPBACK: Final = "127.0.0.1"
_START_S: Final = 15.0
_POLL_S: Final = 0.2


def check_listen(address: Address, *, insecure: bool) -> None:
    """Raise ListenError when the address is beyond loopback without --insecure, or taken."""
    if not address.is_loopback and not insecure:
        raise ListenError(
            f"--listen {address}: the embedded broker has no passwords and no TLS; anyone who "
            "reaches it can join. Type --insecure to allow it on a network you trust"
        )
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


def run_broker(address: Address, say: Callable[[str], None], max_packet_bytes: int = 0) -> int:
    """Run a broker in the foreground until interrupted; returns its exit code.

    Packets above `max_packet_bytes` end their connection (0: room for the largest frame).
    """
    mosquitto = shutil.which("mosquitto")
    if mosquitto is None and max_packet_bytes:
        raise ListenError("--max-packet: amqtt has no packet limit; install mosquitto")
    if mosquitto is None:
        say(f"amqtt (MQTT 3.1.1) listening on {address}")
        asyncio.run(_run_amqtt(address))
        return 0
    with tempfile.TemporaryDirectory(prefix="musplit-broker-") as folder, processes() as group:
        configuration = Path(folder) / "mosquitto.conf"
        configuration.write_text(
            mosquitto_configuration(address, max_packet_bytes), encoding="utf-8"
        )
        log = Path(folder) / "mosquitto.log"
        process = group.start([mosquitto, "-c", str(configuration)], log)
        if not wait_for_broker(address, _START_S, lambda: process.poll() is None):
            raise ListenError(f"mosquitto does not listen on {address}: {last_line(log)}")
        say(f"mosquitto (MQTT 5) listening on {address}")
        while process.poll() is None:
            time.sleep(_POLL_S)
        return process.returncode or 1


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


def mosquitto_configuration(address: Address, max_packet_bytes: int = 0) -> str:
    """A configuration that keeps nothing on disk and drops nothing a fleet sends."""
    return "\n".join(
        (
            f"listener {address.port} {address.host}",
            "allow_anonymous true",
            "persistence false",
            "set_tcp_nodelay true",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            # mosquitto 2.1 cuts connections at 2,000,000 bytes unless told otherwise.
            f"max_packet_size {max_packet_bytes or MAX_FRAME_BYTES + 65536}",
            # The default of 1000 drops messages while the publisher is told success.
            "max_queued_messages 100000",
            "",
        )
    )


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
