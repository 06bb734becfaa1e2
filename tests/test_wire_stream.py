"""The reader of MQTT streams: any fragmentation gives the same packets, nothing hostile fits."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from wire_protocol.errors import HeaderError
from wire_protocol.mqtt_stream import BUFFER_BYTES, Packet, PacketReader, Publish

CAP = 1 << 20


def length(count: int) -> bytes:
    out = bytearray()
    while True:
        out.append(count & 127 | (128 if count > 127 else 0))
        count >>= 7
        if not count:
            return bytes(out)


def packet(command: int, body: bytes) -> bytes:
    return bytes([command]) + length(len(body)) + body


def publish(payload: bytes, *, mid: int = 7, qos: int = 1, properties: bytes | None = b"") -> bytes:
    """A PUBLISH by MQTT 5, or by 3.1.1 when there are no properties."""
    body = b"\0\3a/b" + (mid.to_bytes(2, "big") if qos else b"")
    if properties is not None:
        body += length(len(properties)) + properties
    return packet(0x30 | qos << 1, body + payload)


def feed(reader: PacketReader, stream: bytes, sizes: Iterator[int]) -> list[Publish | Packet]:
    """What comes of a stream that arrives in pieces."""
    out: list[Publish | Packet] = []
    while stream:
        target = reader.target
        count = min(next(sizes), len(target), len(stream))
        target[:count] = stream[:count]
        stream = stream[count:]
        out += reader.feed(count)
    return out


def pieces(kind: str) -> Iterator[int]:
    chance = random.Random(0)
    sizes = {"bytes": (1,), "whole": (1 << 30,), "any": (1, 3, 1000, 70_000, 300_000)}[kind]
    while True:
        yield chance.choice(sizes)


SIZES = [
    0,
    1,
    100,
    BUFFER_BYTES - 12,
    BUFFER_BYTES - 11,
    BUFFER_BYTES - 10,
    BUFFER_BYTES,
    500_000,
    CAP,
]


@pytest.mark.parametrize("mqtt5", [True, False])
@pytest.mark.parametrize("kind", ["whole", "any"])
def test_any_fragmentation_gives_the_same_packets(mqtt5: bool, kind: str) -> None:  # noqa: FBT001
    chance = random.Random(1)
    payloads = [chance.randbytes(size) for size in SIZES]
    properties = b"\x26\0\1a\0\1b" if mqtt5 else None
    stream, want = b"", []
    for number, payload in enumerate(payloads, start=1):
        stream += packet(0x40, number.to_bytes(2, "big"))
        stream += publish(payload, mid=number, properties=properties)
        stream += publish(payload, qos=0, properties=properties) + packet(0xD0, b"")
        want += [
            Packet(0x40, number.to_bytes(2, "big")), Publish(b"a/b", number, payload),
            Publish(b"a/b", 0, payload), Packet(0xD0, b""),
        ]  # fmt: skip
    assert feed(PacketReader(CAP, mqtt5=mqtt5), stream, pieces(kind)) == want


def test_byte_by_byte() -> None:
    stream = publish(b"x" * 300) + packet(0x40, b"\0\1") + publish(b"")
    want = [Publish(b"a/b", 7, b"x" * 300), Packet(0x40, b"\0\1"), Publish(b"a/b", 7, b"")]
    assert feed(PacketReader(CAP, mqtt5=True), stream, pieces("bytes")) == want


def test_a_large_payload_is_a_read_only_view_that_can_be_used_as_float32() -> None:
    (got,) = feed(PacketReader(CAP, mqtt5=True), publish(bytes(400_000)), pieces("any"))
    assert isinstance(got, Publish)
    assert isinstance(got.payload, memoryview)
    assert got.payload.readonly
    assert np.frombuffer(got.payload, "<f4").flags.aligned


def test_a_payload_above_the_cap_is_read_over_and_nothing_allocated() -> None:
    reader = PacketReader(CAP, mqtt5=True)
    stream = publish(bytes(CAP + 1), mid=3) + publish(b"after", mid=4)
    head, rest = stream[:20], stream[20:]
    tracemalloc.start()
    got = feed(reader, head, pieces("whole"))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    got += feed(reader, rest, pieces("any"))
    assert got == [Publish(b"a/b", 3, None), Publish(b"a/b", 4, b"after")]
    tiny = PacketReader(10, mqtt5=True)
    assert feed(tiny, publish(b"x" * 11, mid=5), pieces("whole")) == [Publish(b"a/b", 5, None)]


def test_endless_properties_of_another_client_cost_only_their_message() -> None:
    stream = publish(b"x", mid=3, properties=bytes(BUFFER_BYTES + 5)) + publish(b"after", mid=4)
    got = feed(PacketReader(CAP, mqtt5=True), stream, pieces("any"))
    assert got == [Publish(b"a/b", 3, None), Publish(b"a/b", 4, b"after")]


BROKEN = {
    "topic beyond the packet": b"\x30\x03\xff\xffx",
    "no topic length": b"\x30\x01\x00",
    "no packet id": b"\x32\x03\x00\x01x",
    "no properties": b"\x32\x05\x00\x01x\x00\x01",
    "properties beyond the packet": b"\x32\x06\x00\x01x\x00\x01\x05",
    "QoS 2": b"\x34\x06\x00\x01x\x00\x01\x00",
    "length of five bytes": b"\x30\xff\xff\xff\xff\x01",
    "properties of five bytes": b"\x30\x08\x00\x01x\xff\xff\xff\xff\x01",
    "a large packet that is no PUBLISH": b"\x90\xff\xff\xff\x7f",
}  # fmt: skip


@pytest.mark.parametrize("stream", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_packet_is_an_error(stream: bytes) -> None:
    with pytest.raises(HeaderError):
        feed(PacketReader(CAP, mqtt5=True), stream, pieces("any"))


def test_random_streams_raise_nothing_else() -> None:
    chance = random.Random(2)
    for _ in range(300):
        stream = bytes([chance.choice((0x30, 0x32, 0x40, 0x90))]) + chance.randbytes(200)
        try:
            feed(PacketReader(CAP, mqtt5=chance.random() < 0.5), stream, pieces("any"))
        except HeaderError:
            continue


def test_a_truncated_stream_gives_only_what_is_whole() -> None:
    stream = publish(b"one") + publish(bytes(200_000), mid=8)
    for cut in (len(stream) - 1, len(stream) - 100_000, 20, 15, 5, 1):
        got = feed(PacketReader(CAP, mqtt5=True), stream[:cut], pieces("any"))
        assert got == [Publish(b"a/b", 7, b"one")][: cut >= len(publish(b"one"))]
