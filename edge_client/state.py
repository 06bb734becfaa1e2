"""What a device keeps on disk: its weights at some round, and the bundles it has fetched.

weights.state  magic, SHA-256 of the rest, run id, next round, then d_c float32; written to a
               temporary file, synced and renamed, so a power cut leaves the old one
snapshot.new   a snapshot of the weights while it is fetched
bundles/       one folder per bundle digest
lock           held while a device program runs, so that no two share a state folder
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import struct
from pathlib import Path
from typing import IO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.blobs import BlobFetch, BundleFetch
from edge_client.bundle import Bundle, read_bundle
from edge_client.errors import BundleError, StateError
from edge_client.files import as_octets, replacing

_MAGIC: Final = b"MUSD\x01\0\0\0"
_FIELDS: Final = struct.Struct("<QQ")
_DIGEST_BYTES: Final = 32
_BUNDLES_KEPT: Final = 3


class SavedWeights(NamedTuple):
    """The client weights (d_c,) before round `next_round` of run `run`."""

    run: int
    next_round: int
    weights: NDArray[np.float32]


class StateStore:
    """The state folder of one device. Raises StateError when it is in use or not writable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / "bundles").mkdir(parents=True, exist_ok=True)
            self._lock: IO[bytes] = (folder / "lock").open("wb")
        except OSError as error:
            raise StateError(
                f"{folder}: cannot be used as state folder ({error.strerror})"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateError(
                f"{folder}: another device program uses it; stop that one or give --state DIR"
            ) from error

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()

    def load_weights(self, into: NDArray[np.float32]) -> SavedWeights | None:
        """The last saved weights, read into the buffer `into` (d_c,), which they become.

        None when there are none, of another number, or damaged: `into` holds anything then.
        """
        with contextlib.suppress(OSError), (self.folder / "weights.state").open("rb") as file:
            head = file.read(len(_MAGIC) + _DIGEST_BYTES)
            fields = file.read(_FIELDS.size)
            whole = file.readinto(as_octets(into).data) == into.nbytes and not file.read(1)
            if whole and head == _MAGIC + _digest(fields, into):
                run, next_round = _FIELDS.unpack(fields)
                return SavedWeights(run, next_round, into)
        return None

    def save_weights(self, saved: SavedWeights) -> None:
        """Replace the saved weights atomically. Raises StateError."""
        fields = _FIELDS.pack(saved.run, saved.next_round)
        with replacing(self.folder / "weights.state") as file:
            file.write(_MAGIC + _digest(fields, saved.weights) + fields)
            file.write(as_octets(saved.weights).data)

    def load_bundle(self, digest: str) -> Bundle | None:
        """A fetched bundle, or None when it is not here or damaged."""
        folder = self.folder / "bundles" / digest
        if not folder.is_dir():
            return None
        try:
            bundle = read_bundle(folder)
        except BundleError:
            return None
        return bundle if bundle.digest == digest else None

    def fetch_bundle(self, digest: str, manifest_bytes: int) -> BundleFetch:
        """Begin to fetch a bundle; of those fetched before, the latest stay. Raises StateError."""
        folder = self.folder / "bundles" / digest
        kept = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in kept[: 1 - _BUNDLES_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"{folder}: cannot be made ({error.strerror})") from error
        return BundleFetch(digest, manifest_bytes, folder)

    def fetch_snapshot(self, digest: str, size_bytes: int) -> BlobFetch:
        """Begin to fetch a snapshot of the weights. Raises StateError."""
        return BlobFetch(digest, size_bytes, self.folder / "snapshot.new")


def _digest(fields: bytes, weights: NDArray[np.float32]) -> bytes:
    digest = hashlib.sha256(fields)
    digest.update(as_octets(weights).data)
    return digest.digest()
