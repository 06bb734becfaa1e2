"""Partitioning a training set into the shards that boards carry: iid or Dirichlet, seeded.

Dirichlet by label (Hsu, Qi & Brown, arXiv 1909.06335): each class is dealt out to the devices in
proportions drawn from Dir(alpha); small alpha means skewed devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from server_node.samples import Dataset, shard_samples
from wire_protocol.npz import input_name

_ATTEMPTS: Final = 1000


def partition(
    labels: NDArray[np.int64], devices: int, alpha: float, seed: int, *, minimum: int = 1
) -> list[NDArray[np.int64]]:
    """Sample indices per device; alpha 0 is iid. Every device gets at least `minimum` samples.

    Raises DataError when that cannot be had.
    """
    if len(labels) < devices * minimum:
        raise DataError(f"{len(labels)} samples are too few for {devices} devices")
    random = np.random.default_rng(seed)
    if not alpha:
        return [np.sort(part) for part in np.array_split(random.permutation(len(labels)), devices)]
    for _ in range(_ATTEMPTS):
        shares: list[list[NDArray[np.int64]]] = [[] for _ in range(devices)]
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            bounds = np.cumsum(random.dirichlet(np.full(devices, alpha)))[:-1] * len(members)
            for share, part in zip(shares, np.split(members, bounds.astype(np.int64)), strict=True):
                share.append(part)
        parts = [np.sort(np.concatenate(share)) for share in shares]
        if min(len(part) for part in parts) >= minimum:
            return parts
    raise DataError(
        f"alpha {alpha} leaves a device without samples in each of {_ATTEMPTS} draws: use a larger "
        "alpha or fewer devices"
    )


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:03d}.npz"


def write_shards(data: Dataset, devices: int, alpha: float, seed: int, out: Path) -> list[Path]:
    """Write OUT/shard-000.npz .. and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for index, part in enumerate(partition(data.y_train, devices, alpha, seed)):
        path = out / shard_name(index)
        xs, y = shard_samples(data, part)
        arrays = {input_name("x", i): x for i, x in enumerate(xs)}
        np.savez(path, **arrays, allow_pickle=False, y=y, shard_index=np.int64(index))
        paths.append(path)
    return paths
