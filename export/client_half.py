"""The client half's folder as the server reads it: whole, in memory, checked.

A device reads the same files its own way (edge_client/bundle.py), without holding them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.errors import HalfError
from wire_protocol.errors import InputError
from wire_protocol.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    check_blob,
    parse_manifest,
    sha256,
)


class ClientHalf(NamedTuple):
    """A client bundle: its manifest, and the bytes of its three files."""

    manifest: Manifest
    manifest_data: bytes
    graph: bytes
    weights: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which names the others."""
        return sha256(self.manifest_data)

    @property
    def blobs(self) -> list[bytes]:
        """What devices fetch."""
        return [self.manifest_data, self.graph, self.weights]

    def initial_parameters(self) -> NDArray[np.float32]:
        """The flat client weights (d_c,) that round 0 starts from: a fresh array."""
        return np.frombuffer(self.weights, "<f4", self.manifest.parameters).astype(np.float32)


def read_client_half(folder: Path) -> ClientHalf:
    """Read and check a client bundle. Raises HalfError."""
    try:
        data, graph, weights = (
            (folder / name).read_bytes() for name in (MANIFEST_FILE, GRAPH_FILE, WEIGHTS_FILE)
        )
        manifest = parse_manifest(data, f"{folder / MANIFEST_FILE}")
        check_blob(graph, manifest.graph, f"{folder / GRAPH_FILE}")
        check_blob(weights, manifest.weights, f"{folder / WEIGHTS_FILE}")
    except OSError as error:
        raise HalfError(
            f"{error.filename}: cannot be read ({error.strerror}); a client bundle holds "
            f"{MANIFEST_FILE}, {GRAPH_FILE} and {WEIGHTS_FILE}"
        ) from error
    except InputError as error:
        raise HalfError(str(error)) from error
    return ClientHalf(manifest, data, graph, weights)
