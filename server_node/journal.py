"""The journal: append-only, the truth of a run.

File: magic "MUSJ", version 1, three zero bytes; then records. Record: length (u32), CRC-32 (u32)
of the body, body (one msgpack map or array with a type tag). A record cut short at the end of the
file is what a crash leaves, and is dropped; a checksum that does not match is damage, and is told.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from server_node.errors import JournalError
from wire_protocol.messages import U32

JOURNAL_FILE: Final = "journal.bin"
_MAGIC: Final = b"MUSJ\x01\0\0\0"
_RECORD: Final = struct.Struct("<II")
# Far above any commit: M devices x (K + tau K_s) float32.
_MAX_RECORD_BYTES: Final = 1 << 28


class Header(Struct, frozen=True, tag="run", forbid_unknown_fields=True):
    """First record: everything the replay depends on, and what produced the scalars."""

    run: int
    run_seed: int
    lam: float
    manifest_sha256: str
    server_weights_sha256: str
    config_sha256: str
    server_device: str
    server_threads: int
    server_replicas: int
    environment: dict[str, str]


class DeviceJoined(Struct, frozen=True, tag="device", array_like=True):
    """A device's first join gave it this index."""

    index: int
    device_id: str


class Share(Struct, frozen=True, array_like=True):
    """One device's share of a round; scalars are float32, little-endian."""

    device: U32
    weight: float
    client_scalars: bytes  # (K,)
    server_scalars: bytes  # (tau, K_s), row-major
    directions_server: Annotated[int, Meta(ge=1)]  # K_s


class RoundClosed(Struct, frozen=True, tag="round", array_like=True):
    """A commit: shares by ascending device index."""

    round: U32
    eta_c: float
    eta_s: float
    eta_g: float
    shares: list[Share]


class Digests(Struct, frozen=True, tag="digests", array_like=True):
    """SHA-256 of both halves' weights before `next_round`."""

    next_round: int
    client_sha256: str
    server_sha256: str


class Ended(Struct, frozen=True, tag="end", array_like=True):
    """Last record of a run that was ended rather than cut."""

    reason: str


Record = DeviceJoined | RoundClosed | Digests | Ended

_ENCODER: Final = msgspec.msgpack.Encoder()
_HEADER_DECODER: Final = msgspec.msgpack.Decoder(Header)
_RECORD_DECODER: Final = msgspec.msgpack.Decoder(Record)


class JournalWriter:
    """Appends records; each is flushed to the operating system before the call returns."""

    def __init__(self, path: Path, header: Header) -> None:
        self._file: IO[bytes] = path.open("xb")
        self._file.write(_MAGIC)
        self._append(header)

    def append(self, record: Record) -> None:
        """Append one record."""
        self._append(record)

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _append(self, record: Header | Record) -> None:
        body = _ENCODER.encode(record)
        self._file.write(_RECORD.pack(len(body), zlib.crc32(body)) + body)
        self._file.flush()


class Journal(NamedTuple):
    """A journal as read: its records, and what is wrong with the file (empty when nothing is)."""

    header: Header
    records: list[Record]
    damage: list[str]


def read_journal(path: Path) -> Journal:
    """Read a journal. Raises JournalError when nothing can be made of it.

    A record whose checksum fails is kept when it still decodes, and reported in `damage`: replay
    shows what it leads to.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path}: cannot be read ({error.strerror})") from error
    if data[: len(_MAGIC)] != _MAGIC:
        raise JournalError(f"{path}: not a journal of this version")
    damage: list[str] = []
    bodies = _bodies(path, data, damage)
    try:
        header = _HEADER_DECODER.decode(next(bodies))
    except StopIteration as error:
        raise JournalError(f"{path}: cut short in its first record") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JournalError(f"{path}: first record is not a run header ({error})") from error
    records: list[Record] = []
    for number, body in enumerate(bodies, 2):
        try:
            record = _RECORD_DECODER.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise JournalError(f"{path}: record {number} is damaged ({error})") from error
        if isinstance(record, RoundClosed) and not all(map(_is_even, record.shares)):
            raise JournalError(f"{path}: record {number} is damaged (scalars are cut short)")
        records.append(record)
    return Journal(header, records, damage)


def _is_even(share: Share) -> bool:
    """True when the scalars are whole float32, and whole steps of K_s of them."""
    step_bytes = 4 * share.directions_server
    return not len(share.client_scalars) % 4 and not len(share.server_scalars) % step_bytes


def _bodies(path: Path, data: bytes, damage: list[str]) -> Iterator[bytes]:
    position, number = len(_MAGIC), 1
    while position < len(data):
        if len(data) - position < _RECORD.size:
            damage.append(f"{path}: ends inside the head of record {number}; dropped")
            return
        length, crc = _RECORD.unpack_from(data, position)
        position += _RECORD.size
        body = data[position : position + length]
        if length > _MAX_RECORD_BYTES or len(body) < length:
            damage.append(f"{path}: record {number} is cut short; dropped")
            return
        if zlib.crc32(body) != crc:
            damage.append(f"{path}: record {number} was altered (checksum)")
        yield body
        position += length
        number += 1
