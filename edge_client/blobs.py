"""Fetching blobs by their digests, in chunks, with a window of requests, straight to disk.

A chunk is written where it belongs when it comes: memory does not grow with the blob. The digest
is checked over the file before anything uses it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_client.files import read_hashed, rename, sync, unwritable
from wire_protocol.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Blob,
    parse_manifest,
)
from wire_protocol.messages import CHUNK_BYTES, Chunk, Fetch

# Chunks asked for at once: 512 KiB in flight.
WINDOW: Final = 16
_NOTHING: Final = np.empty(0, np.uint8)


class BlobFetch:
    """Collects one blob in the file `path`. Every method raises StateError when the disk fails.

    `next_request` says what to ask for, `take` stores what came, `finish` checks it.
    """

    def __init__(self, digest: str, size_bytes: int, path: Path) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.path = path
        self._count = -(-size_bytes // CHUNK_BYTES)
        self._forget()
        try:
            self._file = path.open("w+b")
        except OSError as error:
            raise unwritable(path, error) from error

    @property
    def complete(self) -> bool:
        """True when every chunk is here."""
        return self._missing == self._count

    def restart(self) -> None:
        """Nothing came for a while: ask again from the first missing chunk."""
        self._asked_until = self._missing

    def next_request(self) -> Fetch | None:
        """The next window, or None while one is outstanding or everything is here."""
        if self._missing < self._asked_until or self.complete:
            return None
        count = min(WINDOW, self._count - self._missing)
        self._asked_until = self._missing + count
        return Fetch(self.digest, self._missing, count)

    def take(self, chunk: Chunk) -> bool:
        """Store a chunk that was asked for; False when it is not, a repeat, or of a wrong size."""
        index, data = chunk.index, chunk.data
        expected = self._missing <= index < self._asked_until and index not in self._ahead
        if chunk.digest != self.digest or not expected:
            return False
        if len(data) != min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES):
            return False
        try:
            self._file.seek(index * CHUNK_BYTES)
            self._file.write(data)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._ahead.add(index)
        while self._missing in self._ahead:
            self._ahead.remove(self._missing)
            self._missing += 1
        return True

    def finish(self, into: NDArray[np.uint8] = _NOTHING) -> bool:
        """Check the complete blob, sync it, and fill `into` with its first bytes.

        False, and everything is to be fetched anew, when its digest is wrong.
        """
        try:
            self._file.seek(0)
            if read_hashed(self._file, into) != self.digest:
                self._forget()
                return False
            sync(self._file)
            self._file.close()
        except OSError as error:
            raise unwritable(self.path, error) from error
        return True

    def discard(self) -> None:
        """Give up: the file goes away."""
        with contextlib.suppress(OSError):  # what could not be written is not wanted any more
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _forget(self) -> None:
        self._missing = 0  # every chunk before this one is here
        self._asked_until = 0
        self._ahead: set[int] = set()  # those of the window that came before a missing one


class BundleFetch:
    """Collects a client bundle: the manifest, then the graph and the weights that it names.

    The folder counts as a bundle when the manifest gets its name, last of all.
    """

    def __init__(self, manifest_sha256: str, manifest_bytes: int, folder: Path) -> None:
        self.digest = manifest_sha256
        self.folder = folder
        self.complete = False
        self.altered = False  # a whole file came, and was not the one asked for
        self._manifest = self._open(Blob(manifest_sha256, manifest_bytes), MANIFEST_FILE)
        self._blob = self._manifest
        self._rest: list[tuple[Blob, str]] = []

    def restart(self) -> None:
        """Nothing came for a while: ask again from the first missing chunk."""
        self._blob.restart()

    def next_request(self) -> Fetch | None:
        """The next window, or None while one is outstanding or everything is here."""
        return None if self.complete else self._blob.next_request()

    def take(self, chunk: Chunk) -> bool:
        """Store a chunk; False when it is of no use.

        Raises InputError for a bad manifest, StateError when the disk fails.
        """
        if self.complete or not self._blob.take(chunk):
            return False
        if self._blob.complete:
            if self._blob.finish():
                self._turn_over()
            else:
                self.altered = True
        return True

    def discard(self) -> None:
        """Give up; what was fetched whole stays until the folder is used again."""
        if not self.complete:
            self._blob.discard()

    def _turn_over(self) -> None:
        """A blob is here and checked: go on to the next."""
        path = self._blob.path
        try:
            if self._blob is self._manifest:
                manifest = parse_manifest(path.read_bytes(), "fetched manifest")
                self._rest = [(manifest.graph, GRAPH_FILE), (manifest.weights, WEIGHTS_FILE)]
            else:
                rename(path, path.with_suffix(""))
            if not self._rest:
                manifest_path = self._manifest.path
                rename(manifest_path, manifest_path.with_suffix(""))
                self.complete = True
        except OSError as error:
            raise unwritable(path, error) from error
        if self._rest:
            self._blob = self._open(*self._rest.pop(0))

    def _open(self, blob: Blob, name: str) -> BlobFetch:
        return BlobFetch(blob.sha256, blob.size_bytes, self.folder / f"{name}.new")
