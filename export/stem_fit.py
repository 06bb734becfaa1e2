"""Fitting a stem: filters from patches or from chance, the projection from second moments.

The result is a safetensors file of start weights for `stem:D` (model.weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from export.errors import ModelError
from export.stem import (
    CONTRAST,
    FILTERS_BIAS,
    FILTERS_WEIGHT,
    HEAD,
    PATCH,
    PROJECTION_BIAS,
    PROJECTION_WEIGHT,
    StemOptions,
)
from wire_protocol.moments import Moments

_PATCHES: Final = 50_000
_ZCA_EPSILON: Final = 0.05
# Flat patches make filters of noise.
_LEAST_NORM: Final = 1.0
# Correlation of pixels that is assumed where no image is known: exp(-distance / this).
_CORRELATION_PIXELS: Final = 4.0
# Added to each variance, of the largest.
_FLOOR: Final = 1e-3

Array = NDArray[np.float32]
Filters = dict[str, Array]


def filters_from_images(images: Array, count: int, random: np.random.Generator) -> Filters:
    """Whitened patches of public images (n, channels, height, width), chosen by `random`.

    Raises ModelError when the images hold too few patches with contrast.
    """
    n, channels, height, width = images.shape
    rows = random.integers(0, height - PATCH + 1, _PATCHES)
    columns = random.integers(0, width - PATCH + 1, _PATCHES)
    windows = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), (2, 3))
    patches = windows[random.integers(0, n, _PATCHES), :, rows, columns].reshape(_PATCHES, -1)
    patches = patches.astype(np.float64)
    patches -= patches.mean(axis=1, keepdims=True)
    patches /= np.sqrt(np.square(patches).mean(axis=1, keepdims=True) + CONTRAST)
    mean = patches.mean(axis=0)
    zca = _zca(np.cov(patches, rowvar=False), _ZCA_EPSILON)
    whitened = (patches - mean) @ zca
    norms = np.linalg.norm(whitened, axis=1)
    usable = whitened[norms > _LEAST_NORM]
    if len(usable) < count:
        raise ModelError(f"the public images hold {len(usable)} patches with contrast, not {count}")
    chosen = usable[random.permutation(len(usable))[:count]]
    return _filters(chosen, zca, mean, channels)


def random_filters(channels: int, count: int, random: np.random.Generator) -> Filters:
    """Gaussian directions in a space whitened by an assumed correlation of pixels: no data."""
    grid = np.indices((PATCH, PATCH)).reshape(2, -1).T
    apart = np.linalg.norm(grid[:, None] - grid[None], axis=2)
    # Colours of a pixel are taken to be alike.
    alike = np.full((channels, channels), 0.9) + 0.1 * np.eye(channels)
    covariance = np.kron(alike, np.exp(-apart / _CORRELATION_PIXELS))
    size = len(covariance)
    flat = np.eye(size) - 1.0 / size  # patches have no mean
    covariance = flat @ covariance @ flat
    covariance *= size / np.trace(covariance)  # and contrast 1
    directions = random.standard_normal((count, size))
    return _filters(directions, _zca(covariance, _ZCA_EPSILON), np.zeros(size), channels)


def fit_projection(moments: Moments, features: int) -> dict[str, Array]:
    """PCA-whitening to `features` numbers, from sums over all devices. Raises ModelError."""
    n = len(moments.total)
    if not features <= min(n, moments.samples - 1):
        raise ModelError(
            f"{features} features cannot be fitted on {moments.samples} samples of {n} numbers"
        )
    mean = moments.total / moments.samples
    covariance = moments.second / moments.samples - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:features], vectors[:, ::-1][:, :features]
    # eigh leaves the signs open: the largest entry of each vector is positive.
    largest = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(features)])
    scale = 1.0 / np.sqrt(np.maximum(values, 0.0) + _FLOOR * max(float(values[0]), 1e-12))
    weight = (vectors * scale).T
    return {
        PROJECTION_WEIGHT: np.ascontiguousarray(weight, np.float32),
        PROJECTION_BIAS: (-weight @ mean).astype(np.float32),
    }


def save_stem(
    filters: Filters, projection: dict[str, Array], options: StemOptions, path: Path
) -> None:
    """Write start weights for the stem; the head is zero."""
    head = {
        f"{HEAD}.weight": np.zeros((options.classes, options.features), np.float32),
        f"{HEAD}.bias": np.zeros(options.classes, np.float32),
    }
    save_file({**filters, **projection, **head}, path)


def load_filters(path: Path) -> Filters:
    """The filters among a stem's weights. Raises ModelError."""
    try:
        filters: Filters = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read; `musplit stem filters` writes it") from error
    if not {FILTERS_WEIGHT, FILTERS_BIAS} <= set(filters):
        raise ModelError(f"{path}: holds no filters; `musplit stem filters` writes them")
    return {name: filters[name] for name in (FILTERS_WEIGHT, FILTERS_BIAS)}


def _filters(
    directions: NDArray[np.float64], zca: NDArray[np.float64], mean: NDArray[np.float64],
    channels: int,
) -> Filters:  # fmt: skip
    """Kernels that give the product of a unit direction and a whitened patch."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    kernels = unit @ zca
    bias = -kernels @ mean
    kernels -= kernels.mean(axis=1, keepdims=True)  # a patch's mean shall not count
    shape = (len(kernels), channels, PATCH, PATCH)
    return {
        FILTERS_WEIGHT: kernels.reshape(shape).astype(np.float32),
        FILTERS_BIAS: bias.astype(np.float32),
    }


def _zca(covariance: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    whitener: NDArray[np.float64] = (vectors / np.sqrt(np.maximum(values, 0.0) + epsilon)) @ (
        vectors.T
    )
    return whitener
