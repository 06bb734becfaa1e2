"""frames.bin: the activations and labels that first-order steps were computed on.

File: magic "MUSA", version 1, three zero bytes; then records. Record: length (u32), CRC-32 (u32)
of the body, body: one msgpack array. A frame comes before the first round that used it; a round
tells its frames by device and round. Both are on the disk before the journal's record of the round,
so a crash leaves at most rounds that the journal does not have: they are cut off on resuming.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from server_node.errors import JournalError
from server_node.files import replace_file
from wire_protocol.messages import U32

FRAMES_FILE: Final = "frames.bin"
_MAGIC: Final = b"MUSA\x01\0\0\0"
_RECORD: Final = struct.Struct("<II")
# Far above any frame: what a board may send is 64 MiB.
_MAX_RECORD_BYTES: Final = 1 << 28


class StoredFrame(Struct, frozen=True, tag="frame", array_like=True):
    """A device's frame of a round: h float32 and labels uint32, little-endian, row-major."""

    device: U32
    round: U32
    shape: list[U32]
    h: bytes
    labels: bytes

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
        """H (batch, *activation shape) and labels (batch,), as views."""
        return np.frombuffer(self.h, "<f4").reshape(self.shape), np.frombuffer(self.labels, "<u4")


class StoredTurn(Struct, frozen=True, array_like=True):
    """The frames of a device's steps (pooled: of the leader's), each as device and round."""

    device: U32
    frames: list[tuple[U32, U32]]


class StoredRound(Struct, frozen=True, tag="steps", array_like=True):
    """What a committed round was computed on."""

    round: U32
    turns: list[StoredTurn]


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(StoredFrame | StoredRound)


class FramesWriter:
    """Appends rounds, on the disk when a call returns if `durable`. Raises JournalError."""

    def __init__(
        self, folder: Path, size_bytes: int = 0, stored: dict[int, int] | None = None, *,
        durable: bool = True,
    ) -> None:  # fmt: skip
        """Begin a file, or continue one behind `size_bytes`; `stored`: device -> latest round."""
        self._path = folder / FRAMES_FILE
        self._stored = stored or {}
        self._durable = durable
        if not size_bytes:
            _begin(self._path)
        self._file = self._path.open("r+b", buffering=0)
        self.size_bytes = size_bytes or len(_MAGIC)
        self._file.truncate(self.size_bytes)
        self._file.seek(self.size_bytes)

    def append(self, closed: StoredRound, frames: Sequence[StoredFrame]) -> None:
        """Append a round, and those of its frames that the file does not hold."""
        new = [frame for frame in frames if self._stored.get(frame.device) != frame.round]
        data = b"".join([*map(_packed, new), _packed(closed)])
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self.size_bytes)
                self._file.seek(self.size_bytes)
            raise JournalError(
                f"{self._path}: cannot be written ({error.strerror}); free space, then resume"
            ) from error
        self.size_bytes += len(data)
        self._stored.update((frame.device, frame.round) for frame in new)

    def start_over(self) -> None:
        """Forget all rounds: an anchor behind them is on the disk."""
        self._file.close()
        _begin(self._path)
        self._file = self._path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)
        self.size_bytes = len(_MAGIC)
        self._stored.clear()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class FramesRead(NamedTuple):
    """A round as read: for each turn its device and frames, in the order of the batch."""

    turns: list[tuple[int, list[StoredFrame]]]
    end_bytes: int


class FramesReader:
    """Reads rounds in their order, one frame per device in memory.

    `fault` says, once nothing more comes, why. Nothing that a file may hold makes it crash.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FRAMES_FILE
        self._rounds = self._read()
        self.last: dict[int, StoredFrame] = {}  # of each device, up to the round last read
        self.fault = ""

    def find(self, number: int) -> FramesRead | None:
        """Round `number`, rounds before it passed over; None when the file does not hold it."""
        for closed, end_bytes in self._rounds:
            if closed.round < number:
                continue
            if closed.round > number:
                break
            turns = []
            for turn in closed.turns:
                found = [self.last.get(device) for device, _ in turn.frames]
                frames = [frame for frame in found if frame is not None]
                if [(f.device, f.round) for f in frames] != turn.frames:
                    self.fault = f"{self._path}: a frame of round {number} is missing"
                    return None
                turns.append((turn.device, frames))
            return FramesRead(turns, end_bytes)
        self.fault = self.fault or f"{self._path}: round {number} is missing"
        return None

    def whole(self, rounds: int) -> tuple[int, dict[int, int]]:
        """Bytes up to the end of the last round below `rounds`; device -> round of its frame."""
        size_bytes, stored = 0, dict[int, int]()
        for closed, end_bytes in self._rounds:
            if closed.round >= rounds:
                break
            size_bytes = end_bytes
            stored = {device: frame.round for device, frame in self.last.items()}
        return size_bytes, stored

    def _read(self) -> Iterator[tuple[StoredRound, int]]:
        try:
            with self._path.open("rb") as file:
                yield from self._records(file)
        except OSError as error:
            self.fault = f"{self._path}: cannot be read ({error.strerror})"

    def _records(self, file: IO[bytes]) -> Iterator[tuple[StoredRound, int]]:
        if file.read(len(_MAGIC)) != _MAGIC:
            self.fault = f"{self._path}: not a file of this version"
            return
        while head := file.read(_RECORD.size):
            length, crc = _RECORD.unpack(head) if len(head) == _RECORD.size else (0, 0)
            body = file.read(length) if length <= _MAX_RECORD_BYTES else b""
            whole = length > 0 and len(body) == length and zlib.crc32(body) == crc
            record = _decoded(body) if whole else None
            if isinstance(record, StoredRound):
                yield record, file.tell()
            elif record is not None:
                self.last[record.device] = record
            else:
                at = file.tell() - len(body) - len(head)
                self.fault = f"{self._path}: damaged, or cut short, at byte {at}"
                return


def continue_frames(folder: Path, rounds: int) -> FramesWriter:
    """The writer of a run that goes on behind its first `rounds` rounds.

    What a crash left of later ones is cut off.
    """
    size_bytes, stored = FramesReader(folder).whole(rounds)
    return FramesWriter(folder, size_bytes, stored)


def _begin(path: Path) -> None:
    try:
        replace_file(path, lambda file: file.write(_MAGIC))
    except OSError as error:
        raise JournalError(f"{path}: cannot be written ({error.strerror})") from error


def _packed(record: StoredFrame | StoredRound) -> bytes:
    body = _ENCODER.encode(record)
    return _RECORD.pack(len(body), zlib.crc32(body)) + body


def _decoded(body: bytes) -> StoredFrame | StoredRound | None:
    """The record, or None when its parts do not fit each other."""
    try:
        record: StoredFrame | StoredRound = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if isinstance(record, StoredFrame):
        fits = record.shape and 4 * math.prod(record.shape) == len(record.h)
        if not fits or len(record.labels) != 4 * record.shape[0]:
            return None
    return record
