"""What the wire costs, as ratios to what it cannot cost less.

Beside each figure stands the plain operation it is a multiple of:

* encode and decode of a pair of 4 MB (activation and one difference) against a memcpy of its
  bytes; checksums are left out of both and timed apart;
* CPU time of a process that receives messages of 4 MB, per MB, against one that reads the same
  messages from a socket by hand;
* round trip of 100 bytes between two links against two sockets with hand-written MQTT 3.1.1
  packets. Both pairs live in one process each and use the same mosquitto.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import numpy as np

from benchmarks.rows import Row, in_turns, ratio_row
from emulation.broker import free_port, wait_for_broker
from identity.access import Listener, mosquitto_configuration
from wire_protocol import frames
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.encodings import Encoding
from wire_protocol.frames import Frame, FrameKind, decode_frame, encode_frame
from wire_protocol.mqtt import Address, Link, Received

MB: Final = 1 << 20
_ENCODINGS: Final[tuple[Encoding, ...]] = ("float32", "float16", "int8")
_ROUND_TRIPS: Final = 100  # a repetition
_MESSAGES: Final = 16
_MESSAGE_MB: Final = 4
_NO_LABELS: Final = np.empty(0, np.uint32)
# Debian installs it where a user's PATH does not lead.
_MOSQUITTO: Final = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")


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


def _each(work: Callable[[Any], object], items: Sequence[object]) -> list[object]:
    return [work(item) for item in items]


def measure_frames(repetitions: int) -> list[Row]:
    """Encode and decode a pair in every encoding; checksums apart."""
    tensors = [frame.tensor for frame in pair("float32")]
    copies = [np.empty_like(tensor) for tensor in tensors]

    def copy() -> None:
        for source, target in zip(tensors, copies, strict=True):
            np.copyto(target, source)

    works: dict[str, Callable[[], object]] = {
        "memcpy": copy, "checksum": lambda: [zlib.crc32(tensor.data) for tensor in tensors],
    }  # fmt: skip
    sizes: dict[str, int] = {}
    checksum = {"checksum": works.pop("checksum")}
    # Checksums are the same in all encodings and would hide the rest: timed apart.
    with mock.patch.object(frames, "zlib", SimpleNamespace(crc32=lambda *_: 0)):
        for encoding in _ENCODINGS:
            both = pair(encoding)
            sent = [encode_frame(frame) for frame in both]
            sizes[encoding] = sum(map(len, sent))
            works[f"encode {encoding}"] = partial(_each, encode_frame, both)
            works[f"decode {encoding}"] = partial(_each, decode_frame, sent)
        seconds = in_turns(works, repetitions)
    seconds |= in_turns(checksum, repetitions)
    rows = []
    for encoding in _ENCODINGS:
        both_s = [
            a + b
            for a, b in zip(
                seconds[f"encode {encoding}"], seconds[f"decode {encoding}"], strict=True
            )
        ]
        raw = {"both_s": both_s, "memcpy_s": seconds["memcpy"]}
        name = f"encode + decode a 4 MB pair in {encoding}, over memcpy"
        note = f"{sizes[encoding] / sizes['float32']:.3f} of float32's bytes"
        limit = 4.0 if encoding == "float32" else None
        rows.append(ratio_row(name, limit, both_s, seconds["memcpy"], raw, note))
    checksum_s = seconds["checksum"]
    rows.append(
        ratio_row(
            "checksums of a 4 MB pair (CRC-32), over memcpy", None, checksum_s, seconds["memcpy"],
            {"checksum_s": checksum_s}, "sender and receiver each",
        )
    )  # fmt: skip
    return rows


def measure_compression(repetitions: int) -> list[Row]:
    """What zstd keeps of the bytes of its encoding, and takes; dense and ReLU activations."""
    rows = []
    for encoding in _ENCODINGS:
        for relu in (False, True):
            both = pair(encoding, relu=relu)
            plain = sum(len(encode_frame(frame)) for frame in both)
            kept = sum(len(encode_frame(frame, compressed=True)) for frame in both) / plain
            work = {"encode": lambda both=both: [encode_frame(f, compressed=True) for f in both]}
            seconds = in_turns(work, repetitions)["encode"]
            name = f"zstd, {encoding}, {'half zeros' if relu else 'dense'}: bytes kept"
            note = f"{statistics.median(seconds) * 1e3:.1f} ms to encode a 4 MB pair"
            rows.append(Row(name, kept, None, {"encode_s": seconds}, note))
    return rows


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


def measure_round_trip(address: Address, repetitions: int) -> list[Row]:
    """100 bytes there and back at QoS 1, in alternating blocks; a block's median counts."""
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
        links[1].publish("link/a", bytes(event.payload))
        assert links[0].next_event(5.0)

    raw_s, link_s = [], []
    for _ in range(repetitions):
        raw_s.append(_median_s(raw_trip))
        link_s.append(_median_s(link_trip))
    for raw in raws:
        raw.close()
    for link in links:
        link.close()
    name = "round trip of 100 bytes at QoS 1, over two hand-written sockets"
    return [ratio_row(name, 3.0, link_s, raw_s, {"link_s": link_s, "raw_s": raw_s})]


def _median_s(trip: Callable[[], None]) -> float:
    times_s = []
    for _ in range(_ROUND_TRIPS):
        begin_s = time.perf_counter()
        trip()
        times_s.append(time.perf_counter() - begin_s)
    return statistics.median(times_s)


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


def measure_receiving(address: Address, repetitions: int) -> list[Row]:
    """CPU ms per MB of a receiving process: a link's, and a hand-written socket's."""
    costs: dict[str, list[float]] = {"raw": [], "link": []}
    source = RawClient(address, "source", "nothing")
    for _ in range(repetitions):
        for kind, found in costs.items():
            command = [sys.executable, "-m", "benchmarks.transport", kind, str(address.port)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
                assert sink.stdout is not None
                sink.stdout.readline()
                for _ in range(_MESSAGES + 1):
                    source.publish("sink", bytes(_MESSAGE_MB * MB))
                found.append(float(sink.stdout.readline()))
    source.close()
    raw = {f"{kind}_cpu_ms_per_mb": found for kind, found in costs.items()}
    name = f"receive CPU of {_MESSAGE_MB} MB messages, over a hand-written socket's"
    return [ratio_row(name, 2.0, costs["link"], costs["raw"], raw)]


@contextlib.contextmanager
def broker() -> Iterator[Address]:
    """A mosquitto of its own on a free port."""
    assert _MOSQUITTO, "mosquitto is not installed"
    address = Address("127.0.0.1", free_port())
    with tempfile.TemporaryDirectory(prefix="musplit-bench-") as folder:
        configuration = Path(folder) / "mosquitto.conf"
        configuration.write_text(mosquitto_configuration(Listener(*address)), encoding="utf-8")
        process = subprocess.Popen([_MOSQUITTO, "-c", str(configuration)])
        try:
            assert wait_for_broker(address, 10.0, lambda: process.poll() is None)
            yield address
        finally:
            process.terminate()
            process.wait()


def measure(repetitions: int) -> list[Row]:
    """All rows; those that need mosquitto say so where there is none."""
    keep_freed_memory()  # as device and server do
    rows = [*measure_frames(repetitions), *measure_compression(repetitions)]
    if not _MOSQUITTO:
        note = "mosquitto is not installed"
        names = ("round trip of 100 bytes at QoS 1", "receive CPU")
        return [*rows, *(Row(name, None, None, {}, note) for name in names)]
    with broker() as address:
        rows += measure_round_trip(address, repetitions)
        rows += measure_receiving(address, repetitions)
    return rows


if __name__ == "__main__":
    receive(sys.argv[1], int(sys.argv[2]))
