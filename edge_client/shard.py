"""The data that a board carries: one npz file with x (n, *shape), y (n,) and its place.

A model with several inputs takes x, x_1, x_2, .. in the order of its arguments.

x is raw (any integer or float type); the bundle's transform makes it the graph's input, so that
device and server cannot disagree. `shard_index` is optional and orders the devices of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import ShardError
from wire_protocol.errors import InputError
from wire_protocol.manifest import Manifest, misfit
from wire_protocol.npz import input_arrays, parse_npz


class Shard(NamedTuple):
    """Samples, labels y (n,), and which shard of its partition this is (-1: none)."""

    path: Path
    xs: list[NDArray[np.generic]]  # one (n, *raw shape) per input of the model
    y: NDArray[np.int64]
    shard_index: int

    @property
    def samples(self) -> int:
        """How many samples the shard holds."""
        return len(self.y)


def load_shard(path: Path) -> Shard:
    """Read a shard without pickle. Raises ShardError."""
    try:
        with path.open("rb") as file:
            arrays = parse_npz(file, ("x", "y"), str(path))
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be read ({error.strerror}); `musplit shard` writes shards"
        ) from error
    except InputError as error:
        raise ShardError(f"{error}; a shard holds x and y, `musplit shard` writes them") from error
    xs, y = input_arrays(arrays, "x"), arrays["y"]
    for x in xs:
        if x.dtype.kind not in "buif" or y.dtype.kind not in "ui":
            raise ShardError(
                f"{path}: x must be numbers and y integers, not {x.dtype} and {y.dtype}"
            )
        if y.ndim != 1 or x.ndim < 1 or len(x) != len(y) or not len(y):
            raise ShardError(f"{path}: x {x.shape} and y {y.shape} need the same, non-zero, length")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise ShardError(f"{path}: x holds values that are not finite; clean the data")
    return Shard(path, xs, y.astype(np.int64), _shard_index(path, arrays))


def _shard_index(path: Path, arrays: dict[str, NDArray[Any]]) -> int:
    index = arrays.get("shard_index", np.int64(-1))
    if index.size != 1 or index.dtype.kind not in "ui" or not -1 <= int(index) < 1 << 32:
        raise ShardError(f"{path}: shard_index must be one number from 0 on; write it again")
    return int(index)


def check_shard(shard: Shard, manifest: Manifest) -> None:
    """Raise ShardError when the shard's samples or labels do not fit the model."""
    fault = misfit(manifest, shard.xs)
    if fault:
        raise ShardError(f"{shard.path}: {fault}; use the shards of this run's data")
    low, high = int(shard.y.min()), int(shard.y.max())
    if low < 0 or high >= manifest.classes:
        raise ShardError(
            f"{shard.path}: label {low if low < 0 else high} is outside 0..{manifest.classes - 1}; "
            f"model {manifest.model} has {manifest.classes} classes"
        )
