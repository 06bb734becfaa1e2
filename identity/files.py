"""Files of an identity: private ones are never readable by others, not even for a moment."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from wire_protocol.errors import IdentityError

BROKER_FILE: Final = "broker.pem"
BROKER_KEY_FILE: Final = "broker.key"
SIGNER_KEY_FILE: Final = "signer.key"
SIGNER_FILE: Final = "signer.pub"
_PRIVATE: Final = 0o600
_PUBLIC: Final = 0o644
# No file of an identity is larger: what is, is none.
_MAX_BYTES: Final = 1 << 20


def make_folder(folder: Path) -> None:
    """A folder that only its owner can enter. Raises IdentityError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError(f"{folder}: cannot be made ({error.strerror})") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One program at a time works in a folder. Raises IdentityError."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise IdentityError(f"{folder}: cannot be read ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_private(path: Path, data: bytes) -> None:
    """Replace a secret (mode 600), synced. Raises IdentityError."""
    _write(path, data, _PRIVATE)


def write_public(path: Path, data: bytes) -> None:
    """Replace a file that everybody may read, synced. Raises IdentityError."""
    _write(path, data, _PUBLIC)


def read(path: Path, remedy: str) -> bytes:
    """The bytes of a file. Raises IdentityError with the remedy."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if len(data) > _MAX_BYTES:
        raise IdentityError(f"{path}: too large; {remedy}")
    return data


def _write(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # A key that a power cut takes back would leave a used token behind.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be written ({error.strerror})") from error
