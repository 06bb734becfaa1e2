"""What the wire costs, as ratios to what it cannot cost less: run `python benchmarks/transport.py`.

Each figure is the median of several repetitions in one run on one machine, beside the plain
operation it is a multiple of:

* encode and decode of a pair of 4 MB (activation and one difference) against a memcpy of its
  bytes; checksums are left out of both and timed apart;
* CPU time of a process that receives messages of 4 MB, per MB, against one that reads the same
  messages from a socket by hand;
* round trip of 100 bytes between two links against two sockets with hand-written MQTT 3.1.1
  packets. Both pairs live in one process each and use the same mosquitto.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import numpy as np

from emulation.broker import free_port, mosquitto_configuration, wait_for_broker
from wire_protocol import frames
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.encodings import Encoding
from wire_protocol.frames import Frame, FrameKind, decode_frame, encode_frame
from wire_protocol.mqtt import Address, Link, Received

MB: Final = 1 << 20
_REPETITIONS: Final = 31
_ROUND_TRIPS: Final = 400
_MESSAGES: Final = 32
_MESSAGE_MB: Final = 4
_NO_LABELS: Final = np.empty(0, np.uint32)
# Debian installs it where a user's PATH does not lead.
_MOSQUITTO: Final = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")


def median_ms(run: Callable[[], object], repetitions: int = _REPETITIONS) -> float:
    """The median time of a call, after two that warm caches and allocator."""
    times_s = []
    for _ in range(repetitions + 2):
        begin_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - begin_s)
    return statistics.median(times_s[2:]) * 1e3


# -- frames ----------------------------------------------------------------------------------


def pair(encoding: Encoding, *, relu: bool = False) -> list[Frame]:
    """An activation and one difference, 4 MB as float32 together: batch 32, 64 channels, 16x16."""
    random = np.random.default_rng(0)
    h = random.standard_normal((32, 64, 16, 16), np.float32)
    d = random.standard_normal((1, *h.shape), np.float32) * np.float32(1e-3)
    if relu:
        d *= h > 0
        h *= h > 0
    first = Frame(FrameKind.ACTIVATION, 1, 2, 3, 0, h, np.arange(32, dtype=np.uint32), encoding)
    return [first, first._replace(kind=FrameKind.DIFFERENCES, tensor=d, labels=_NO_LABELS)]


def measure_frames() -> dict[str, Any]:
    """Encode and decode a pair in every encoding; checksums apart."""
    tensors = [frame.tensor for frame in pair("float32")]
    copies = [np.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for source, target in zip(tensors, copies, strict=True):
            np.copyto(target, source)

    result: dict[str, Any] = {
        "memcpy_ms": median_ms(copy),
        "checksum_ms": median_ms(lambda: [zlib.crc32(tensor) for tensor in tensors]),
    }
    unchecked = SimpleNamespace(crc32=lambda *_: 0)
    with mock.patch.object(frames, "zlib", unchecked):
        for encoding in ("float32", "float16", "int8"):
            both = pair(encoding)
            payloads = [encode_frame(frame) for frame in both]
            encode_ms = median_ms(lambda both=both: [encode_frame(frame) for frame in both])
            decode_ms = median_ms(lambda sent=payloads: [decode_frame(part) for part in sent])
            result[encoding] = {
                "encode_ms": encode_ms,
                "decode_ms": decode_ms,
                "bytes": sum(map(len, payloads)),
                "ratio_to_memcpy": (encode_ms + decode_ms) / result["memcpy_ms"],
            }
    return result


def measure_compression() -> dict[str, Any]:
    """What zstd saves, of the bytes of its encoding, and takes; dense and ReLU activations."""
    result: dict[str, Any] = {}
    for encoding in ("float32", "float16", "int8"):
        for relu in (False, True):
            both = pair(encoding, relu=relu)
            plain = sum(len(encode_frame(frame)) for frame in both)
            packed = [encode_frame(frame, compressed=True) for frame in both]
            result[f"{encoding} {'half zeros' if relu else 'dense'}"] = {
                "bytes_of_uncompressed": sum(map(len, packed)) / plain,
                "encode_ms": median_ms(
                    lambda both=both: [encode_frame(frame, compressed=True) for frame in both], 5
                ),
                "decode_ms": median_ms(
                    lambda sent=packed: [decode_frame(part) for part in sent], 5
                ),
            }
    return result


# -- sockets with hand-written packets -----------------------------------------------------------


class RawClient:
    """MQTT 3.1.1 by hand: no thread, no queue, one buffer."""

    def __init__(self, address: Address, name: str, topic: str) -> None:
        self._sock = socket.create_connection(address)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(8 * MB))
        connect = b"\0\4MQTT\4\2\0\0" + _text(name)
        self._sock.sendall(_packet(0x10, connect))
        self._next(0x20)
        self._sock.sendall(_packet(0x82, b"\0\1" + _text(topic) + b"\1"))
        self._next(0x90)

    def publish(self, topic: str, payload: bytes) -> None:
        """Send at QoS 1; the PUBACK is passed over later."""
        self._sock.sendall(_packet(0x32, _text(topic) + b"\0\1" + payload))

    def receive(self) -> memoryview:
        """The next PUBLISH's payload, acknowledged; PUBACKs are passed over."""
        body = self._next(0x30)
        begin = 2 + int.from_bytes(body[:2], "big")
        self._sock.sendall(b"\x40\2" + body[begin : begin + 2])
        return body[begin + 2 :]

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def _next(self, kind: int) -> memoryview:
        while True:
            command = self._exactly(1)[0]
            length = shift = 0
            while True:
                byte = self._exactly(1)[0]
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            body = self._exactly(length)
            if command & 0xF0 == kind:
                return body

    def _exactly(self, count: int) -> memoryview:
        filled = 0
        while filled < count:
            filled += self._sock.recv_into(self._buffer[filled:count])
        return self._buffer[:count]


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def _packet(command: int, body: bytes) -> bytes:
    length, left = bytearray(), len(body)
    while True:
        length.append(left & 127 | (128 if left > 127 else 0))
        left >>= 7
        if not left:
            return bytes([command]) + bytes(length) + body


# -- round trip ------------------------------------------------------------------------------


def measure_round_trip(address: Address) -> dict[str, Any]:
    """100 bytes there and back at QoS 1, in alternating blocks; medians over all trips."""
    payload = bytes(100)
    raws = [RawClient(address, f"raw-{name}", f"raw/{name}") for name in "ab"]
    links = [Link(f"link-{name}", address, subscriptions=[f"link/{name}"]) for name in "ab"]
    for link in links:
        link.open(10.0)
        link.next_event(5.0)

    def raw_trip() -> None:
        raws[0].publish("raw/b", payload)
        raws[1].publish("raw/a", bytes(raws[1].receive()))
        raws[0].receive()

    def link_trip() -> None:
        links[0].publish("link/b", payload)
        event = links[1].next_event(5.0)
        assert isinstance(event, Received)
        links[1].publish("link/a", event.payload)
        assert links[0].next_event(5.0)

    raw_ms, link_ms = [], []
    for _ in range(4):
        raw_ms.append(median_ms(raw_trip, _ROUND_TRIPS // 4))
        link_ms.append(median_ms(link_trip, _ROUND_TRIPS // 4))
    for client in (*raws, *links):
        client.close()
    raw, linked = statistics.median(raw_ms), statistics.median(link_ms)
    return {"raw_ms": raw, "link_ms": linked, "ratio_to_raw": linked / raw}


# -- receiving -------------------------------------------------------------------------------


def receive(kind: str, port: int) -> None:
    """In a process of its own: take `_MESSAGES` of 4 MB, print the CPU ms per MB they took."""
    keep_freed_memory()
    address = Address("127.0.0.1", port)
    link = Link("sink", address, subscriptions=["sink"]) if kind == "link" else None
    raw = RawClient(address, "sink", "sink") if link is None else None
    if link is not None:
        link.open(10.0)
        link.next_event(5.0)
    print("ready", flush=True)
    begin_s = None
    for _ in range(_MESSAGES + 1):  # the first one warms
        if link is not None:
            event = link.next_event(30.0)
            assert isinstance(event, Received)
            assert len(event.payload) == _MESSAGE_MB * MB
        elif raw is not None:
            assert len(raw.receive()) == _MESSAGE_MB * MB
        begin_s = time.process_time() if begin_s is None else begin_s
    assert begin_s is not None
    print((time.process_time() - begin_s) * 1e3 / _MESSAGES / _MESSAGE_MB, flush=True)


def measure_receiving(address: Address, repetitions: int = 5) -> dict[str, Any]:
    """CPU ms per MB of a receiving process: a link's, and a hand-written socket's."""
    costs: dict[str, list[float]] = {"raw": [], "link": []}
    source = RawClient(address, "source", "nothing")
    for _ in range(repetitions):
        for kind, found in costs.items():
            command = [sys.executable, __file__, kind, str(address.port)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
                assert sink.stdout is not None
                sink.stdout.readline()
                for _ in range(_MESSAGES + 1):
                    source.publish("sink", bytes(_MESSAGE_MB * MB))
                found.append(float(sink.stdout.readline()))
    source.close()
    raw, linked = statistics.median(costs["raw"]), statistics.median(costs["link"])
    return {
        "raw_cpu_ms_per_mb": raw, "link_cpu_ms_per_mb": linked, "ratio_to_raw": linked / raw,
    }  # fmt: skip


@contextlib.contextmanager
def broker() -> Iterator[Address]:
    """A mosquitto of its own on a free port."""
    assert _MOSQUITTO, "mosquitto is not installed"
    address = Address("127.0.0.1", free_port())
    with tempfile.TemporaryDirectory(prefix="musplit-bench-") as folder:
        configuration = Path(folder) / "mosquitto.conf"
        configuration.write_text(mosquitto_configuration(address), encoding="utf-8")
        process = subprocess.Popen([_MOSQUITTO, "-c", str(configuration)])
        try:
            assert wait_for_broker(address, 10.0, lambda: process.poll() is None)
            yield address
        finally:
            process.terminate()
            process.wait()


def measure() -> dict[str, Any]:
    """All figures; those that need mosquitto are None where there is none."""
    keep_freed_memory()  # as device and server do
    result: dict[str, Any] = {
        "frames_4_mb_pair": measure_frames(),
        "compression": measure_compression(),
        "round_trip_100_bytes": None,
        "receiving_4_mb_messages": None,
    }
    if _MOSQUITTO:
        with broker() as address:
            result["round_trip_100_bytes"] = measure_round_trip(address)
            result["receiving_4_mb_messages"] = measure_receiving(address)
    return result


if __name__ == "__main__":
    if len(sys.argv) == 3:
        receive(sys.argv[1], int(sys.argv[2]))
    else:
        print(json.dumps(measure(), indent=2))
