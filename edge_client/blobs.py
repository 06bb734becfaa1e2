"""Fetching blobs by their digests, in chunks, with a window of requests: pure bookkeeping."""

from __future__ import annotations

from typing import Final

from wire_protocol.manifest import parse_manifest, sha256
from wire_protocol.messages import CHUNK_BYTES, Chunk, Fetch

# Chunks asked for at once: 512 KiB in flight.
WINDOW: Final = 16


class BlobFetch:
    """Collects one blob. `next_request` says what to ask for, `take` stores what came."""

    def __init__(self, digest: str, size_bytes: int) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self._chunks: dict[int, bytes] = {}
        self._count = -(-size_bytes // CHUNK_BYTES)
        self._missing = 0  # every chunk before this one is here
        self._asked_until = 0

    @property
    def complete(self) -> bool:
        """True when every chunk is here."""
        return len(self._chunks) == self._count

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
        """Store a chunk of this blob; False when it is another's, a repeat, or of a wrong size."""
        index, data = chunk.index, chunk.data
        if chunk.digest != self.digest or not 0 <= index < self._count or index in self._chunks:
            return False
        if len(data) != min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES):
            return False
        self._chunks[index] = data
        while self._missing in self._chunks:
            self._missing += 1
        return True

    def assemble(self) -> bytes | None:
        """The blob, or None (and everything forgotten) when its digest is wrong."""
        data = b"".join(self._chunks[i] for i in range(self._count))
        if sha256(data) == self.digest:
            return data
        self._chunks.clear()
        self._missing = self._asked_until = 0
        return None


class BundleFetch:
    """Collects a client bundle: the manifest, then the graph and the weights that it names."""

    def __init__(self, manifest_sha256: str, manifest_bytes: int) -> None:
        self.parts: list[bytes] = []
        self._blob = BlobFetch(manifest_sha256, manifest_bytes)

    @property
    def complete(self) -> bool:
        """True when manifest, graph and weights are here."""
        return len(self.parts) == 3

    def restart(self) -> None:
        """Nothing came for a while: ask again from the first missing chunk."""
        self._blob.restart()

    def next_request(self) -> Fetch | None:
        """The next window, or None while one is outstanding or everything is here."""
        return None if self.complete else self._blob.next_request()

    def take(self, chunk: Chunk) -> bool:
        """Store a chunk; False when it is of no use. Raises InputError for a bad manifest."""
        if self.complete or not self._blob.take(chunk):
            return False
        data = self._blob.assemble() if self._blob.complete else None
        if data is not None:
            self.parts.append(data)
            if not self.complete:
                manifest = parse_manifest(self.parts[0], "fetched manifest")
                blob = manifest.graph if len(self.parts) == 1 else manifest.weights
                self._blob = BlobFetch(blob.sha256, blob.size_bytes)
        return True
