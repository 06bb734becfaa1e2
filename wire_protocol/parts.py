"""Messages larger than the broker takes, in parts: cut by the sender, joined and proved here.

offset size field (little-endian)
     0    4 magic "MUSP"
     4    1 version (1)
     5    3 reserved, zero
     8    4 index of this part, from 0
    12    4 count of parts, at least 2
    16    4 total bytes of the message
    20   32 SHA-256 of the message: its name
    52      data: ceil(total / count) bytes; in the last part what is left, at least one byte

Parts may come in any order and more than once; those of a message that is sent again complete the
parts that came before.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from hashlib import sha256
from typing import Final, NamedTuple

from wire_protocol.errors import HeaderError
from wire_protocol.mqtt_stream import Payload

# Room for CONNECT with client id and will, for SUBSCRIBE, and for a part's header on the longest
# topic with some data behind it.
MIN_PACKET_BYTES: Final = 512
MAGIC: Final = b"MUSP"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sB3sIII32s")
HEADER_BYTES: Final = _HEADER.size
# What one message may be cut into; the sender's queue holds as many.
MAX_PARTS: Final = 16384
# Messages that may be incomplete at once on one topic: a sender's latest are what it waits for.
_PER_TOPIC: Final = 4
# All incomplete messages together: four of the largest.
_HELD_BYTES: Final = 256 << 20
# Memory of a held part beside its data, generously: tiny parts must not hold more than they count.
_PART_BYTES: Final = 512


def split(payload: bytes, room: int) -> list[bytes] | None:
    """The message in parts of at most `room` bytes each; None when that takes too many."""
    data_bytes = room - HEADER_BYTES
    count = -(-len(payload) // data_bytes) if data_bytes > 0 else MAX_PARTS + 1
    if count > MAX_PARTS:
        return None
    digest, size = sha256(payload).digest(), -(-len(payload) // count)
    view = memoryview(payload)
    return [
        _HEADER.pack(MAGIC, _VERSION, b"\0\0\0", index, count, len(payload), digest)
        + view[index * size : (index + 1) * size]
        for index in range(count)
    ]


def is_part(payload: Payload) -> bool:
    """True for what `Joiner.take` wants."""
    return payload[:4] == MAGIC


class _Message(NamedTuple):
    """One incomplete message: parts by index."""

    pieces: int
    total: int
    parts: dict[int, Payload]


class Joiner:
    """Joins parts, in bounded memory: what has waited longest for a part is given up first."""

    def __init__(self, max_payload_bytes: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        # By topic, then by digest; what got a part last stands at the end.
        self._topics: OrderedDict[str, OrderedDict[bytes, _Message]] = OrderedDict()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Memory that incomplete messages count for."""
        return self._held_bytes

    def take(self, topic: str, part: Payload) -> bytes | None:
        """The message that this part completes, or None. Raises HeaderError."""
        index, count, total, digest = self._check(part)
        waiting = self._topics.setdefault(topic, OrderedDict())
        self._topics.move_to_end(topic)
        message = waiting.setdefault(digest, _Message(count, total, {}))
        waiting.move_to_end(digest)
        if (message.pieces, message.total) != (count, total):
            raise HeaderError(f"part {index} of {count} contradicts the parts before it")
        if index not in message.parts:
            message.parts[index] = part
            self._held_bytes += len(part) + _PART_BYTES
        if len(message.parts) < count:
            if len(waiting) > _PER_TOPIC:
                self._drop(topic, next(iter(waiting)))
            while self._held_bytes > _HELD_BYTES:
                oldest, messages = next(iter(self._topics.items()))
                self._drop(oldest, next(iter(messages)))
            return None
        self._drop(topic, digest)
        joined = b"".join(memoryview(message.parts[i])[HEADER_BYTES:] for i in range(count))
        if sha256(joined).digest() != digest:
            raise HeaderError(f"message of {total} bytes in {count} parts has another digest")
        return joined

    def _check(self, part: Payload) -> tuple[int, int, int, bytes]:
        if len(part) < HEADER_BYTES:
            raise HeaderError(f"part of {len(part)} bytes is shorter than its header")
        magic, version, pad, index, count, total, digest = _HEADER.unpack_from(part)
        if magic != MAGIC or version != _VERSION or any(pad):
            raise HeaderError(f"part starts with {magic!r} version {version}")
        if not 2 <= count <= MAX_PARTS or index >= count or total > self._max_payload_bytes:
            raise HeaderError(f"part {index} of {count}, {total} bytes in all, is out of range")
        size = -(-total // count)
        rest = total - size * (count - 1)
        wanted = size if index + 1 < count else rest
        if rest < 1 or wanted != len(part) - HEADER_BYTES:
            raise HeaderError(
                f"part {index} of {count} has {len(part) - HEADER_BYTES} bytes, not {wanted}"
            )
        return index, count, total, digest

    def _drop(self, topic: str, digest: bytes) -> None:
        waiting = self._topics[topic]
        message = waiting.pop(digest)
        self._held_bytes -= sum(len(part) + _PART_BYTES for part in message.parts.values())
        if not waiting:
            del self._topics[topic]
