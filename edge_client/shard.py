"""The data that a board carries: one npz file with x (n, *shape), y (n,) and its place.

x is raw (any integer or float type); the bundle's transform makes it the graph's input, so that
device and server cannot disagree. `shard_index` is optional and orders the devices of a run.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import ShardError
from wire_protocol.manifest import Manifest, same_shape


class Shard(NamedTuple):
    """Samples x (n, *shape), labels y (n,), and which shard of its partition this is (-1: none)."""

    path: Path
    x: NDArray[np.generic]
    y: NDArray[np.int64]
    shard_index: int

    @property
    def samples(self) -> int:
        """How many samples the shard holds."""
        return len(self.y)


def load_shard(path: Path) -> Shard:
    """Read a shard without pickle. Raises ShardError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"x", "y"} - set(archive.files)
            if missing:
                raise ShardError(
                    f"{path}: array {min(missing)!r} is missing; a shard holds x and y"
                )
            x, y = archive["x"], archive["y"]
            index = int(archive["shard_index"]) if "shard_index" in archive.files else -1
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file; `musplit shard` writes shards") from error
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ShardError(f"{path}: not a readable npz file ({error}); write it again") from error
    if x.dtype.kind not in "buif" or y.dtype.kind not in "ui":
        raise ShardError(f"{path}: x must be numbers and y integers, not {x.dtype} and {y.dtype}")
    if y.ndim != 1 or len(x) != len(y) or not len(y):
        raise ShardError(f"{path}: x {x.shape} and y {y.shape} need the same, non-zero, length")
    if not np.isfinite(x).all():
        raise ShardError(f"{path}: x holds values that are not finite; clean the data")
    return Shard(path, x, y.astype(np.int64), index)


def check_shard(shard: Shard, manifest: Manifest) -> None:
    """Raise ShardError when the shard's samples or labels do not fit the model."""
    want, have = tuple(manifest.input.shape), shard.x.shape[1:]
    if not same_shape(have, want):
        raise ShardError(
            f"{shard.path}: samples have shape {have}, model {manifest.model} takes {want}; "
            "use the shards of this run's data"
        )
    low, high = int(shard.y.min()), int(shard.y.max())
    if low < 0 or high >= manifest.classes:
        raise ShardError(
            f"{shard.path}: label {low if low < 0 else high} is outside 0..{manifest.classes - 1}; "
            f"model {manifest.model} has {manifest.classes} classes"
        )
