"""What the agent gets in chunks: the run's bundle, or a snapshot of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_client.blobs import BlobFetch, BundleFetch
from edge_client.state import StateStore
from identity.errors import UntrustedError
from wire_protocol.messages import Chunk, Fetch, Snapshot

Bytes = tuple[int, int]  # of the stream, up and down


class Fetching:
    """One fetch at a time. `ask` puts a request on the link, `stream` counts the link's bytes.

    `signed`: bundles come with a signature, so that one that differs was altered on its way.
    """

    def __init__(
        self, store: StateStore, ask: Callable[[Fetch], None], stream: Callable[[], Bytes], *,
        signed: bool,
    ) -> None:  # fmt: skip
        self._store, self._ask, self._stream, self._signed = store, ask, stream, signed
        self._fetch: BlobFetch | BundleFetch | None = None
        self._began: Bytes = (0, 0)
        self._progress_s = 0.0
        self.snapshot: Snapshot | None = None  # whose weights are being fetched
        self.bundle_bytes: Bytes = (0, 0)  # that the run's bundle took

    @property
    def progress_s(self) -> float | None:
        """When something came, or was asked for, last; None while nothing is fetched."""
        return None if self._fetch is None else self._progress_s

    @property
    def under_way(self) -> bool:
        """True while there is a fetch."""
        return self._fetch is not None

    def fetch_bundle(self, manifest_sha256: str, manifest_bytes: int) -> None:
        """Begin with a bundle. Raises StateError."""
        self._began = self._stream()
        self._begin(self._store.fetch_bundle(manifest_sha256, manifest_bytes))

    def fetch_snapshot(self, snapshot: Snapshot) -> None:
        """Begin with the weights of a snapshot. Raises StateError."""
        self.snapshot = snapshot
        self._begin(self._store.fetch_snapshot(snapshot.sha256, snapshot.size_bytes))

    def take(self, chunk: Chunk) -> BlobFetch | BundleFetch | None:
        """Take a chunk; returns the fetch when it was the last one.

        A bundle is done with then, a snapshot until `drop`. Raises InputError for a bad manifest,
        StateError when the disk fails, UntrustedError when a signed bundle was altered.
        """
        fetch = self._fetch
        if fetch is None or not fetch.take(chunk):
            return None
        self._progress_s = time.monotonic()
        if isinstance(fetch, BundleFetch) and fetch.altered and self._signed:
            raise UntrustedError(
                f"bundle {fetch.digest[:12]} was altered on its way: nothing of it is run; who "
                "else can write to this device's topic?"
            )
        if not fetch.complete:
            self._request(fetch)
            return None
        if isinstance(fetch, BundleFetch):
            self._fetch = None
            now, began = self._stream(), self._began
            self.bundle_bytes = (now[0] - began[0], now[1] - began[1])
        return fetch

    def again(self) -> None:
        """Nothing came for a while: ask again. A snapshot is given up: the server keeps few."""
        if self.snapshot is not None:
            self.drop()
        if self._fetch is not None:
            self._fetch.restart()
            self._request(self._fetch)

    def drop(self) -> None:
        """Give up what is being fetched."""
        if self._fetch is not None:
            self._fetch.discard()
        self._fetch = self.snapshot = None

    def forget_run(self) -> None:
        """Nothing of this run counts for the next one."""
        self.drop()
        self.bundle_bytes = (0, 0)

    def _begin(self, fetch: BlobFetch | BundleFetch) -> None:
        self._fetch = fetch
        self._request(fetch)

    def _request(self, fetch: BlobFetch | BundleFetch) -> None:
        self._progress_s = time.monotonic()
        request = fetch.next_request()
        if request is not None:
            self._ask(request)
