"""The client bundle on disk: checked when opened, its weights checked again whenever they are read.

manifest.json   see wire_protocol.manifest; its SHA-256 is the bundle's digest
client.onnx     the graph
weights.bin     stays on disk: a half of N bytes is read straight into the buffer that needs it
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import BundleError
from edge_client.files import hash_file, read_hashed
from wire_protocol.errors import InputError
from wire_protocol.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Blob,
    Manifest,
    check_blob,
    parse_manifest,
    sha256,
)
from wire_protocol.messages import MAX_MANIFEST_BYTES

# A graph holds no weights: 70 KB is usual. It is read into memory.
MAX_GRAPH_BYTES = 64 << 20


class Bundle(NamedTuple):
    """A whole, checked bundle."""

    digest: str
    manifest: Manifest
    graph: bytes
    folder: Path

    def read_weights(self, into: NDArray[np.uint8]) -> None:
        """Fill `into` with the first bytes of weights.bin. Raises BundleError.

        All bytes of the file go into the digest that is checked, those that are not kept too.
        """
        path = self.folder / WEIGHTS_FILE
        try:
            with path.open("rb") as file:
                digest = read_hashed(file, into)
        except OSError as error:
            raise _unreadable(path, error) from error
        if digest != self.manifest.weights.sha256:
            raise BundleError(f"{path}: changed since it was checked; copy the bundle again")

    def initial_parameters(self) -> NDArray[np.float32]:
        """The flat client weights (d_c,) that round 0 starts from: a fresh array."""
        weights = np.empty(self.manifest.parameters, "<f4")
        self.read_weights(weights.view(np.uint8))
        return weights


def read_bundle(folder: Path) -> Bundle:
    """Read and check a bundle folder. Raises BundleError."""
    try:
        data = _read(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        manifest = parse_manifest(data, f"{folder / MANIFEST_FILE}")
        graph = _read(folder / GRAPH_FILE, MAX_GRAPH_BYTES)
        check_blob(graph, manifest.graph, f"{folder / GRAPH_FILE}")
    except InputError as error:
        raise BundleError(str(error)) from error
    _check_file(folder / WEIGHTS_FILE, manifest.weights)
    return Bundle(sha256(data), manifest, graph, folder)


def _read(path: Path, limit_bytes: int) -> bytes:
    """At most one byte more than `limit_bytes`: a longer file fails its check."""
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_file(path: Path, blob: Blob) -> None:
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            digest = hash_file(file) if size_bytes == blob.size_bytes else ""
    except OSError as error:
        raise _unreadable(path, error) from error
    if size_bytes != blob.size_bytes:
        raise BundleError(
            f"{path}: {size_bytes} bytes instead of {blob.size_bytes}: truncated or from another "
            "bundle; copy it again"
        )
    if digest != blob.sha256:
        raise BundleError(f"{path}: digest differs from the manifest's; copy the bundle again")


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{path}: cannot be read ({error.strerror}); a client bundle holds "
        f"{MANIFEST_FILE}, {GRAPH_FILE} and {WEIGHTS_FILE}"
    )
