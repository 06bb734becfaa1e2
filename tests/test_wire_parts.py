"""Messages in parts: exact bytes, any order, and nothing hostile costs more than its own."""

from __future__ import annotations

import random
import struct
from hashlib import sha256

import pytest

from wire_protocol import parts
from wire_protocol.errors import HeaderError
from wire_protocol.parts import HEADER_BYTES, MAX_PARTS, Joiner, is_part, split

MESSAGE = bytes(range(10))
GOLDEN = [
    bytes.fromhex(
        f"4d555350 01 000000 {index:02x}000000 03000000 0a000000 "
        "1f825aa2f0020ef7cf91dfa30da4668d791c5d4824fc8e41354b89ec05795ab3" + data
    )
    for index, data in enumerate(["00010203", "04050607", "0809"])
]
LARGEST = 1 << 20


def part(
    message: bytes = MESSAGE, *, index: int = 0, count: int = 3, total: int | None = None,
    digest: bytes | None = None,
) -> bytes:  # fmt: skip
    total = len(message) if total is None else total
    size = -(-total // count)
    header = struct.pack(
        "<4sB3sIII32s", b"MUSP", 1, b"\0\0\0", index, count, total,
        digest or sha256(message).digest(),
    )  # fmt: skip
    return header + message[index * size : (index + 1) * size]


def test_parts_are_golden_bytes() -> None:
    assert split(MESSAGE, HEADER_BYTES + 4) == GOLDEN
    joiner = Joiner(LARGEST)
    assert [joiner.take("t", piece) for piece in GOLDEN] == [None, None, MESSAGE]
    assert joiner.held_bytes == 0


@pytest.mark.parametrize("size", [2, 3, 100, 4095, 4096, 4097, 65536, 70_001])
@pytest.mark.parametrize("data", [1, 7, 1000, 4096])
def test_every_order_and_every_repetition_gives_the_message(size: int, data: int) -> None:
    chance = random.Random(size * data)
    message = chance.randbytes(size)
    pieces = split(message, HEADER_BYTES + data)
    if -(-size // data) > MAX_PARTS:
        assert pieces is None
        return
    assert pieces is not None
    assert all(is_part(piece) and len(piece) <= HEADER_BYTES + data for piece in pieces)
    if len(pieces) < 2:
        return
    chance.shuffle(pieces)
    joiner = Joiner(LARGEST)
    last = pieces.pop()
    for piece in (*pieces, *pieces):
        assert joiner.take("t", memoryview(piece)) is None
    assert joiner.take("t", last) == message


def test_a_message_sent_again_completes_the_parts_that_came_before() -> None:
    joiner = Joiner(LARGEST)
    assert joiner.take("t", GOLDEN[2]) is None
    assert joiner.take("t", GOLDEN[0]) is None
    assert joiner.take("t", GOLDEN[0]) is None
    assert joiner.take("other", GOLDEN[1]) is None  # another sender's parts are its own
    assert joiner.take("t", GOLDEN[1]) == MESSAGE


def test_a_room_below_the_header_or_too_many_parts_is_none() -> None:
    assert split(MESSAGE, HEADER_BYTES) is None
    assert split(bytes(MAX_PARTS + 1), HEADER_BYTES + 1) is None
    assert len(split(bytes(MAX_PARTS), HEADER_BYTES + 1) or []) == MAX_PARTS


@pytest.mark.parametrize("length", range(len(GOLDEN[0])))
def test_truncation_at_every_byte_is_refused(length: int) -> None:
    with pytest.raises(HeaderError):
        Joiner(LARGEST).take("t", GOLDEN[0][:length])


HUGE = 0xFFFFFFFF
LIES = {
    "version": GOLDEN[0][:4] + b"\2" + GOLDEN[0][5:],
    "reserved": GOLDEN[0][:7] + b"\1" + GOLDEN[0][8:],
    "index beyond the count": part(index=3, count=3),
    "no parts": GOLDEN[0][:12] + bytes(4) + GOLDEN[0][16:],
    "one part": part(count=1),
    "endless parts": part(count=HUGE),
    "more parts than bytes": part(count=11, index=1),
    "parts that leave nothing for the last": part(MESSAGE[:5], count=4, index=3),
    "more than the cap": part(total=LARGEST + 1),
    "nothing": part(b"", total=0),
    "endless bytes": part(total=HUGE),
    "a byte more": GOLDEN[1] + b"\0",
    "a byte less": GOLDEN[2][:-1],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lying_header_is_refused_and_holds_nothing(lie: bytes) -> None:
    joiner = Joiner(LARGEST)
    with pytest.raises(HeaderError):
        joiner.take("t", lie)
    assert joiner.held_bytes == 0


def test_altered_parts_are_refused_and_the_message_can_come_again() -> None:
    joiner = Joiner(LARGEST)
    joiner.take("t", GOLDEN[0][:-1] + b"\xff")
    joiner.take("t", GOLDEN[1])
    with pytest.raises(HeaderError, match="digest"):
        joiner.take("t", GOLDEN[2])
    assert joiner.held_bytes == 0
    assert [joiner.take("t", piece) for piece in GOLDEN] == [None, None, MESSAGE]


def test_parts_that_contradict_those_before_are_refused() -> None:
    joiner = Joiner(LARGEST)
    joiner.take("t", GOLDEN[0])
    with pytest.raises(HeaderError, match="contradicts"):
        joiner.take("t", part(count=2))
    assert joiner.take("t", GOLDEN[1]) is None
    assert joiner.take("t", GOLDEN[2]) == MESSAGE


def test_one_topic_holds_few_messages_and_costs_others_nothing() -> None:
    joiner = Joiner(LARGEST)
    joiner.take("honest", GOLDEN[0])
    for number in range(1000):
        joiner.take("hostile", part(b"%010d" % number))
    assert joiner.held_bytes < 10_000
    joiner.take("honest", GOLDEN[1])
    assert joiner.take("honest", GOLDEN[2]) == MESSAGE


def test_all_topics_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited longest goes first: a sender that goes on sending is not touched."""
    monkeypatch.setattr(parts, "_HELD_BYTES", 100_000)
    joiner = Joiner(LARGEST)
    message = random.Random(0).randbytes(10_000)
    pieces = split(message, HEADER_BYTES + 1000) or []
    for number, piece in enumerate(pieces):
        for other in range(50):
            assert joiner.take(f"{number}-{other}", part(b"%010d" % other)) is None
            assert joiner.held_bytes <= 100_000
        whole = joiner.take("honest", piece)
    assert whole == message
