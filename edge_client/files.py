"""Files that are hashed while they stream, and that replace others only when they are whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import StateError

# Enough to keep an SD card streaming, little beside a half.
_PIECE_BYTES: Final = 1 << 20


def hash_file(file: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of what is left of a file."""
    return read_hashed(file, np.empty(0, np.uint8))


def read_hashed(file: IO[bytes], into: NDArray[np.uint8]) -> str:
    """Fill `into` from a file, then read on to its end; SHA-256 of all that was read."""
    digest = hashlib.sha256()
    rest = np.empty(_PIECE_BYTES, np.uint8)
    done = 0
    while True:
        piece = into[done : done + _PIECE_BYTES] if done < into.size else rest
        count = file.readinto(piece.data)  # type: ignore[attr-defined]
        if not count:
            return digest.hexdigest()
        digest.update(piece[:count].data)
        done += count


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends well. Raises StateError.

    Synced, renamed, and the folder synced: a power cut leaves the old file or the whole new one.
    """
    temporary = path.with_suffix(".new")
    try:
        # What lies there may be a link that came with somebody's folder: it is not written through.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            yield file
            sync(file)
        rename(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error


def sync(file: IO[bytes]) -> None:
    """Have what was written on the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Rename a synced file and sync its folder. Raises OSError."""
    old.replace(new)
    folder = os.open(new.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def unwritable(path: Path, error: OSError) -> StateError:
    """What is said of a full disk."""
    return StateError(
        f"{path}: cannot be written ({error.strerror}); free space or give --state DIR"
    )


def as_octets(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of a contiguous array, little-endian, without a copy."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8)
