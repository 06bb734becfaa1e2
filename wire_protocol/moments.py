"""Sums over a device's samples from which a covariance is made: count, sum, second moment.

What a device gives away for a stem: n features make n (n + 3) / 2 numbers, whatever the number of
samples. Sums of several devices are added; none of them says which sample made what. A device with
few samples gives more away: with one sample the sum is that sample's features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import InputError
from wire_protocol.npz import parse_npz

_ARRAYS: Final = ("samples", "total", "second", "bundle_sha256")


class Moments(NamedTuple):
    """Of `samples` samples with n features each, computed with one bundle."""

    bundle_sha256: str
    samples: int
    total: NDArray[np.float64]  # (n,)
    second: NDArray[np.float64]  # (n, n), symmetric: sum of f f^T

    @classmethod
    def nothing(cls, bundle_sha256: str, features: int) -> Moments:
        """Sums over no samples."""
        return cls(bundle_sha256, 0, np.zeros(features), np.zeros((features, features)))

    def add(self, features: NDArray[np.float32]) -> Moments:
        """With the features (samples, n) of further samples; the sums are updated in place."""
        wide = features.astype(np.float64)
        self.total[...] += wide.sum(axis=0)
        self.second[...] += wide.T @ wide
        return self._replace(samples=self.samples + len(features))

    def join(self, other: Moments) -> Moments:
        """With the sums of another device, in place. Raises InputError when they do not fit."""
        if other.bundle_sha256 != self.bundle_sha256 or other.total.shape != self.total.shape:
            raise InputError("moments of different bundles cannot be added: use one stem's filters")
        self.total[...] += other.total
        self.second[...] += other.second
        return self._replace(samples=self.samples + other.samples)


def save_moments(moments: Moments, path: Path) -> int:
    """Write them: the upper triangle, float32. Returns the file's bytes."""
    upper = np.triu_indices(len(moments.total))
    with path.open("wb") as file:
        np.savez(
            file, allow_pickle=False, bundle_sha256=np.array(moments.bundle_sha256),
            samples=np.int64(moments.samples), total=moments.total,
            second=moments.second[upper].astype(np.float32),
        )  # fmt: skip
        return file.tell()


def load_moments(path: Path) -> Moments:
    """Read what `save_moments` wrote. Raises InputError."""
    try:
        with path.open("rb") as file:
            arrays = parse_npz(file, _ARRAYS, str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    total, triangle, samples = arrays["total"], arrays["second"], arrays["samples"]
    n = total.size
    whole = (
        total.shape == (n,) and triangle.shape == (n * (n + 1) // 2,) and samples.shape == ()
        and total.dtype == np.float64 and triangle.dtype == np.float32
        and samples.dtype.kind == "i"
    )  # fmt: skip
    if not (whole and samples > 0 and np.isfinite(total).all() and np.isfinite(triangle).all()):
        raise InputError(f"{path}: holds no moments; `musplit stem stats` writes them")
    second = np.zeros((n, n))
    second[np.triu_indices(n)] = triangle
    second += np.triu(second, 1).T
    return Moments(str(arrays["bundle_sha256"]), int(samples), total, second)
