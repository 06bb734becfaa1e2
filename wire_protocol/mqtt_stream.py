"""Reading an MQTT stream (3.1.1 and 5), pure: where the next bytes go, and the packets they make.

Small packets are taken from one buffer, several at a time. The payload of a larger PUBLISH is
received into memory of its own, which is handed on as a read-only view: no copy
but of what lay in the buffer. A payload above the cap is read over, and nothing allocated for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from wire_protocol.errors import HeaderError

Payload: TypeAlias = bytes | memoryview

# Holds the longest topic (65,535 bytes) with the packet id behind it, and many small packets.
BUFFER_BYTES: Final = 128 << 10
# Read at once, and the largest packet that is copied out of the buffer.
_SMALL_BYTES: Final = 16 << 10
# A packet's type and flags, then its length in at most four bytes (MQTT 5, section 2.1.4).
_MAX_FIXED_BYTES: Final = 5
_PUBLISH: Final = 0x30


class Publish(NamedTuple):
    """A PUBLISH; `payload` is None when it was above the cap. `mid` is 0 at QoS 0."""

    topic: bytes
    mid: int
    payload: Payload | None


class Packet(NamedTuple):
    """Any other packet: first byte, and what follows the length."""

    command: int
    body: bytes


class PacketReader:
    """Takes a stream: receive into `target`, then `feed` how many bytes that were."""

    def __init__(self, max_payload_bytes: int, *, mqtt5: bool) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._mqtt5 = mqtt5
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._filled = 0
        self._large: Publish | None = None  # being received; its payload is all of `_rest` later
        self._rest = memoryview(b"")  # of its payload: what is still missing
        self._skip = 0  # bytes to read over before it is whole

    @property
    def target(self) -> memoryview:
        """Where the next bytes of the stream belong; never empty."""
        if self._skip:
            return self._buffer[: self._skip]
        return self._rest or self._buffer[self._filled : self._filled + _SMALL_BYTES]

    def feed(self, count: int) -> Iterator[Publish | Packet]:
        """The packets that the `count` bytes in `target` complete. Raises HeaderError."""
        if self._large is None:
            self._filled += count
            yield from self._packets()
            return
        if self._skip:
            self._skip -= count
        else:
            self._rest = self._rest[count:]
        if not self._skip and not self._rest:
            whole, self._large = self._large, None
            yield whole

    def _packets(self) -> Iterator[Publish | Packet]:
        begin = 0
        while begin < self._filled:
            data = self._buffer[begin : self._filled]
            fixed, length = _fixed_header(data)
            if not fixed:
                break
            if fixed + length <= len(data):
                begin += fixed + length
                yield self._small(data[0], data[fixed : fixed + length])
                continue
            if fixed + length > _SMALL_BYTES and self._begin_large(data, fixed, length):
                begin = self._filled
            break
        left = self._filled - begin
        if begin and left:
            self._buffer[:left] = bytes(self._buffer[begin : self._filled])
        self._filled = left

    def _small(self, command: int, body: memoryview) -> Publish | Packet:
        if command & 0xF0 != _PUBLISH:
            return Packet(command, bytes(body))
        head = self._head(command, body)
        if head is None:
            raise HeaderError("a PUBLISH ends within its header")
        publish, begin = head
        fits = len(body) - begin <= self._max_payload_bytes
        return publish._replace(payload=bytes(body[begin:]) if fits else None)

    def _begin_large(self, data: memoryview, fixed: int, length: int) -> bool:
        """Prepare for a large packet; False while its header is not here."""
        if data[0] & 0xF0 != _PUBLISH:
            if fixed + length <= BUFFER_BYTES:
                return False
            raise HeaderError(f"a packet of type {data[0] >> 4} has {length} bytes")
        here = data[fixed:]
        head = self._head(data[0], here)
        if head is None and len(data) < BUFFER_BYTES:
            return False
        if head is None or not 0 <= length - head[1] <= self._max_payload_bytes:
            # Too large, or somebody's endless properties: acknowledged when it has passed.
            self._large, _ = self._topic(data[0], here) or (None, 0)
            self._skip = length - len(here)
            return True
        publish, begin = head
        payload = np.empty(length - begin, np.uint8).data
        payload[: len(here) - begin] = here[begin:]
        self._rest = payload[len(here) - begin :]
        self._large = publish._replace(payload=payload.toreadonly())
        return True

    def _head(self, command: int, body: memoryview) -> tuple[Publish, int] | None:
        """Topic and packet id, and where the payload begins; None when that is not all here."""
        head = self._topic(command, body)
        if head is None or not self._mqtt5:
            return head
        publish, begin = head
        size, value = _variable_integer(body[begin:])
        begin += size + value
        return (publish, begin) if size and begin <= len(body) else None

    @staticmethod
    def _topic(command: int, body: memoryview) -> tuple[Publish, int] | None:
        """Topic and packet id, and where they end (MQTT 5, section 3.3.2)."""
        qos = command >> 1 & 3
        if qos > 1:
            raise HeaderError(f"a PUBLISH of QoS {qos} was never subscribed to")
        if len(body) < 2:
            return None
        middle = 2 + int.from_bytes(body[:2], "big")
        end = middle + 2 * qos
        if end > len(body):
            return None
        return Publish(bytes(body[2:middle]), int.from_bytes(body[middle:end], "big"), None), end


def _fixed_header(data: memoryview) -> tuple[int, int]:
    """Bytes of the fixed header, and the length it gives; (0, 0) when it is not all here."""
    size, length = _variable_integer(data[1:_MAX_FIXED_BYTES])
    return (1 + size, length) if size else (0, 0)


def _variable_integer(data: memoryview) -> tuple[int, int]:
    """Bytes used and value (MQTT 5, section 1.5.5); (0, 0) when it is not all here."""
    value = 0
    for index, byte in enumerate(data[:4]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return index + 1, value
    if len(data) >= 4:
        raise HeaderError("a length of more than four bytes")
    return 0, 0
