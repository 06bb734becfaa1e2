"""The journal: append-only, the truth of a run.

File: magic "MUSJ", version 2, three zero bytes; then records. Record: length (u32), CRC-32 (u32)
of the body, body (one msgpack map or array with a type tag). A record cut short at the end of the
file is what a crash leaves, and is dropped; a checksum that does not match is damage, and is told.
A reader that only looks keeps going behind damage; one that will append refuses it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from server_node.errors import JournalError
from server_node.files import sync_folder
from wire_protocol.client_optimiser import ClientRule
from wire_protocol.messages import U32, ClientOptimiser

JOURNAL_FILE: Final = "journal.bin"
_MAGIC: Final = b"MUSJ\x02\0\0\0"
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
    client_optimiser: ClientOptimiser
    momentum: float
    beta2: float

    @property
    def client_rule(self) -> ClientRule:
        """What makes a step of a commit."""
        return ClientRule(self.client_optimiser, self.momentum, self.beta2)


class DeviceJoined(Struct, frozen=True, tag="device", array_like=True):
    """A device's first join gave it this index."""

    index: int
    device_id: str


class Share(Struct, frozen=True, array_like=True):
    """One device's share of a round; scalars are float32, little-endian."""

    device: U32
    weight: float  # of the client half's step
    client_scalars: bytes  # (K,)
    server_weight: float
    server_scalars: bytes  # (tau, K_s), row-major; empty in first order
    directions_server: Annotated[int, Meta(ge=1)]  # K_s
    staleness: U32 = 0  # its directions are those of round `round - staleness`


class RoundClosed(Struct, frozen=True, tag="round", array_like=True):
    """A commit: shares by ascending device index."""

    round: U32
    eta_c: float
    eta_s: float
    eta_g: float
    shares: list[Share]


class Guarded(Struct, frozen=True, tag="guard", array_like=True):
    """A guard intervened in round `round`, for a device or (-1) for all; the scalars show it."""

    round: U32
    device: int
    guard: str
    value: float


class Digests(Struct, frozen=True, tag="digests", array_like=True):
    """SHA-256 of both halves' weights before `next_round`."""

    next_round: int
    client_sha256: str
    server_sha256: str


class Ended(Struct, frozen=True, tag="end", array_like=True):
    """The server ended the run rather than being cut off; last, unless it was resumed."""

    reason: str


class Resumed(Struct, frozen=True, tag="resumed", array_like=True):
    """Another start of the server continues the run; what produces the scalars from here on."""

    next_round: int
    server_device: str
    server_threads: int
    server_replicas: int
    environment: dict[str, str]


Record = DeviceJoined | RoundClosed | Guarded | Digests | Ended | Resumed

_ENCODER: Final = msgspec.msgpack.Encoder()
_HEADER_DECODER: Final = msgspec.msgpack.Decoder(Header)
_RECORD_DECODER: Final = msgspec.msgpack.Decoder(Record)
# How the bodies of later records begin: an array of few elements, the first one the tag.
_TAGS: Final = (record.__struct_config__.tag for record in Record.__args__)
_BODY_START: Final = re.compile(
    b"[\x90-\x9f](?:%s)" % b"|".join(msgspec.msgpack.encode(tag) for tag in _TAGS)
)


class JournalWriter:
    """Appends records; they are on the disk when a call returns.

    When that fails (a full disk), what was written of them is taken back, and JournalError raised.
    """

    def __init__(
        self, path: Path, header: Header | None, *records: Record, size_bytes: int = 0,
        durable: bool = True,
    ) -> None:  # fmt: skip
        """Begin a journal; there must be none. It then holds all of `records`, or is torn.

        Without a header: continue one behind its first `size_bytes`; what follows is cut off.
        Not `durable`: records go to the system, which writes them to the disk when it likes.
        """
        self._durable = durable
        self._path, self._size_bytes = path, size_bytes
        self._file = io.FileIO(path, "r+b" if header is None else "xb")
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)
        if header is not None:
            self._write(_MAGIC + b"".join(map(_packed, (header, *records))))
            sync_folder(path.parent)

    def append(self, record: Record) -> None:
        """Append one record."""
        self._write(_packed(record))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size_bytes)
                self._file.seek(self._size_bytes)
            raise JournalError(
                f"{self._path}: cannot be written ({error.strerror}); free space, then resume"
            ) from error
        self._size_bytes += len(data)


def _packed(record: Header | Record) -> bytes:
    body = _ENCODER.encode(record)
    return _RECORD.pack(len(body), zlib.crc32(body)) + body


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
    return _parse(path, _read(path))


def read_to_continue(path: Path) -> tuple[Journal, int] | None:
    """A journal that will be continued, and the size in bytes of its whole records.

    A torn end, which is what a crash or a power cut leaves, is dropped and told in `damage`. None
    when even the first record is torn. Raises JournalError for any other damage: dropping what
    lies behind it would lose rounds without need.
    """
    data = _read(path)
    size_bytes = _whole_bytes(path, data)
    if size_bytes <= len(_MAGIC):
        return None
    journal = _parse(path, data[:size_bytes])
    if size_bytes < len(data):
        torn = f"{path}: its last {len(data) - size_bytes} bytes are a torn record; dropped"
        journal.damage.append(torn)
    return journal, size_bytes


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(path: Path, data: bytes) -> Journal:
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


def _whole_bytes(path: Path, data: bytes) -> int:
    """Where the torn end begins. Raises JournalError when whole records follow the damage."""
    if not data.rstrip(b"\0") or (len(data) < len(_MAGIC) and _MAGIC.startswith(data)):
        return 0
    position, number = len(_MAGIC), 1
    while len(data) - position >= _RECORD.size:
        length, crc = _RECORD.unpack_from(data, position)
        begin = position + _RECORD.size
        body = data[begin : begin + length]
        if not length or len(body) < length or zlib.crc32(body) != crc:
            break
        position += _RECORD.size + length
        number += 1
    for found in _BODY_START.finditer(data, position + _RECORD.size + 1):
        begin = found.start()
        length, crc = _RECORD.unpack_from(data, begin - _RECORD.size)
        body = data[begin : begin + length]
        if len(body) == length and zlib.crc32(body) == crc:
            raise JournalError(
                f"{path}: record {number} at byte {position} is damaged, and whole records follow: "
                f"no crash leaves that. Restore the file from a copy, or give up what follows: "
                f"truncate -s {position} {path}"
            )
    return position


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
