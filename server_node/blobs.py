"""The blobs that devices may fetch: the bundle's, and the latest snapshots of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from wire_protocol.manifest import sha256
from wire_protocol.messages import CHUNK_BYTES, Chunk, Fetch

# Snapshots kept for devices that are fetching them, beside the bundle's three blobs.
_SNAPSHOTS_KEPT: Final = 4


class BlobShelf:
    """Holds blobs by digest, and the latest request of each device."""

    def __init__(self, bundle: list[bytes]) -> None:
        self._bundle = {sha256(blob): blob for blob in bundle}
        self._snapshots: dict[str, bytes] = {}
        self._fetches: dict[str, Fetch] = {}

    @property
    def asked(self) -> bool:
        """True while a request is not answered."""
        return bool(self._fetches)

    def offer(self, data: bytes) -> str:
        """Make a snapshot fetchable; returns its digest."""
        digest = sha256(data)
        self._snapshots.pop(digest, None)
        self._snapshots[digest] = data
        while len(self._snapshots) > _SNAPSHOTS_KEPT:
            del self._snapshots[next(iter(self._snapshots))]
        return digest

    def ask(self, device_id: str, fetch: Fetch) -> None:
        """Note a request; it replaces the device's one before."""
        self._fetches[device_id] = fetch

    def answer(self) -> tuple[str, Iterator[Chunk]]:
        """The oldest request's device and chunks; none for a blob that is not here."""
        device_id = next(iter(self._fetches))
        fetch = self._fetches.pop(device_id)
        return device_id, self._chunks(fetch)

    def _chunks(self, fetch: Fetch) -> Iterator[Chunk]:
        if fetch.digest in self._snapshots:  # in use: not the next to go
            self._snapshots[fetch.digest] = self._snapshots.pop(fetch.digest)
        blob = self._bundle.get(fetch.digest) or self._snapshots.get(fetch.digest, b"")
        last = min(fetch.first + fetch.count, -(-len(blob) // CHUNK_BYTES))
        for index in range(fetch.first, last):
            begin = index * CHUNK_BYTES
            yield Chunk(fetch.digest, index, blob[begin : begin + CHUNK_BYTES])
