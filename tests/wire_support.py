"""What the tests of the MQTT link stand on: brokers as processes, scripted brokers, a proxy."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from wire_protocol.mqtt import Address

# Debian installs it where a user's PATH does not lead.
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
CONNACK = b"\x20\x03\x00\x00\x00"  # MQTT 5, success
Script = Callable[[socket.socket, int], None]


def free_address() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", probe.getsockname()[1])


class BrokerProcess:
    """A broker that can be killed and started again at the same address."""

    def __init__(self, kind: str, folder: Path, extra: str = "") -> None:
        self.address = free_address()
        self._environment: dict[str, str] = dict(os.environ)
        if kind == "mosquitto":
            configuration = folder / "mosquitto.conf"
            configuration.write_text(
                f"listener {self.address.port} 127.0.0.1\nallow_anonymous true\n"
                f"persistence false\n{extra}\n"
            )
            self._command = [str(MOSQUITTO), "-c", str(configuration)]
        else:
            self._environment["PATH"] = "/nonexistent"  # the command finds no mosquitto there
            self._command = [
                sys.executable, "-m", "musplit", "broker", "--listen", str(self.address),
            ]  # fmt: skip
        self._log = folder / "broker.log"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment,
            )  # fmt: skip
        deadline_s = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(self.address, timeout=1).close()
                return
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline_s, "the broker does not listen"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Server:
    """Listens on a free port and runs `script(connection, number)` in a thread for each client."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def connections(self) -> int:
        return len(self._open)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection, len(self._open)))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            self._script(connection, number)

    def close(self) -> None:
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join()


class CountingProxy(Server):
    """Forwards TCP streams to `target` and counts their bytes."""

    def __init__(self, target: Address) -> None:
        self.bytes_up = self.bytes_down = 0
        self._target = target
        super().__init__(self._forward)

    def hang_up(self) -> None:
        """End the latest stream towards the client; what the client still sends is counted."""
        self._open[-1].shutdown(socket.SHUT_WR)

    def _forward(self, client: socket.socket, _number: int) -> None:
        with socket.create_connection(self._target) as broker:
            down = threading.Thread(target=self._pump_down, args=(broker, client))
            down.start()
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    self.bytes_up += len(data)
                    broker.sendall(data)
            with contextlib.suppress(OSError):
                broker.shutdown(socket.SHUT_RDWR)
            down.join()

    def _pump_down(self, broker: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := broker.recv(65536):
                self.bytes_down += len(data)
                client.sendall(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def read_packet(connection: socket.socket) -> tuple[int, bytes]:
    """First byte and body of the next MQTT packet; (0, b"") at the end of the stream."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := connection.recv(count - len(data))):
            data += piece
        return data

    first = exactly(1)
    if not first:
        return 0, b""
    size = shift = 0
    while True:
        byte = exactly(1)[0]
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return first[0], exactly(size)


def welcome(connection: socket.socket) -> None:
    """Play a broker's part until the client has connected and subscribed, by MQTT 5."""
    assert read_packet(connection)[0] == 0x10
    connection.sendall(CONNACK)
    kind, body = read_packet(connection)
    assert kind == 0x82
    connection.sendall(b"\x90\x04" + body[:2] + b"\x00\x01")


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True
