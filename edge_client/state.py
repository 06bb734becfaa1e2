"""What a device keeps on disk: its weights at some round, and the bundles it has fetched.

weights.state  magic, SHA-256 of the rest, run id, next round, then d_c float32; written to a
               temporary file, synced and renamed, so a power cut leaves the old one
bundles/       one folder per bundle digest
lock           held while a device program runs, so that no two share a state folder
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import IO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import BundleError, StateError
from wire_protocol.errors import InputError
from wire_protocol.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Bundle,
    assemble,
    sha256,
)

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

    def load_weights(self) -> SavedWeights | None:
        """The last saved weights, or None when there are none or they are damaged."""
        try:
            data = (self.folder / "weights.state").read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + _DIGEST_BYTES
        body = data[start:]
        intact = data[: len(_MAGIC)] == _MAGIC and len(body) >= _FIELDS.size
        if not intact or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
            return None
        run, next_round = _FIELDS.unpack_from(body)
        weights = np.frombuffer(body, "<f4", offset=_FIELDS.size).astype(np.float32)
        return SavedWeights(run, next_round, weights)

    def save_weights(self, saved: SavedWeights) -> None:
        """Replace the saved weights atomically. Raises StateError."""
        body = _FIELDS.pack(saved.run, saved.next_round) + saved.weights.astype("<f4").tobytes()
        self._replace(self.folder / "weights.state", _MAGIC + hashlib.sha256(body).digest() + body)

    def load_bundle(self, digest: str) -> Bundle | None:
        """A fetched bundle, or None when it is not here or damaged."""
        folder = self.folder / "bundles" / digest
        if not folder.is_dir():
            return None
        try:
            bundle = read_bundle(folder)
        except InputError:
            return None
        return bundle if bundle.digest == digest else None

    def save_bundle(self, manifest: bytes, graph: bytes, weights: bytes) -> None:
        """Keep a fetched bundle; the manifest is written last. Raises StateError."""
        folder = self.folder / "bundles" / sha256(manifest)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"{folder}: cannot be made ({error.strerror})") from error
        self._replace(folder / GRAPH_FILE, graph)
        self._replace(folder / WEIGHTS_FILE, weights)
        self._replace(folder / MANIFEST_FILE, manifest)
        kept = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in kept[:-_BUNDLES_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StateError(
                f"{path}: cannot be written ({error.strerror}); free space or give --state DIR"
            ) from error


def read_bundle(folder: Path) -> Bundle:
    """Read and check a bundle folder. Raises BundleError."""
    parts: list[bytes] = []
    for name in (MANIFEST_FILE, GRAPH_FILE, WEIGHTS_FILE):
        try:
            parts.append((folder / name).read_bytes())
        except OSError as error:
            raise BundleError(
                f"{folder / name}: cannot be read ({error.strerror}); a client bundle holds "
                f"{MANIFEST_FILE}, {GRAPH_FILE} and {WEIGHTS_FILE}"
            ) from error
    try:
        return assemble(parts[0], parts[1], parts[2], str(folder))
    except InputError as error:
        raise BundleError(str(error)) from error
