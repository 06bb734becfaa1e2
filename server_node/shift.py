"""Shifted devices: what a sensor does to the devices' and the test samples, not to public ones.

For fine-tuning: a model that was trained on public samples meets others on the devices. The shift
acts on the raw samples of the first input, before shards are written.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from server_node.samples import Dataset, image_axes
from server_node.sections import DataSection

# Deviation of the logarithm of a sensor element's gain.
_GAIN_DEVIATION: Final = 0.5
_GAIN_SEED: Final = 2510_21155

Array = NDArray[np.generic]


def shift(data: Dataset, section: DataSection) -> Dataset:
    """The same with the shift of `section` applied. Raises DataError where it does not fit.

    rotate90  counter-clockwise; images with equal sides
    invert    x becomes low + high - x, the extremes of the training set
    gain      each element of a sample is multiplied by a factor of its own, the same on all devices
    """
    train, test = data.x_train[0], data.x_test[0]
    if section.shift == "rotate90":
        axes = _image_axes(data, train.shape[1:], channels_last=section.channels_last)
        train, test = (np.ascontiguousarray(np.rot90(x, axes=axes)) for x in (train, test))
    elif section.shift == "invert":
        low, high = train.min(), train.max()
        train, test = (_inverted(x, float(low), float(high)) for x in (train, test))
    else:
        factors = _gains(train.shape[1:])
        train, test = (x.astype(np.float32) * factors for x in (train, test))
    return data._replace(
        x_train=[train, *data.x_train[1:]], x_test=[test, *data.x_test[1:]],
        notes=(*data.notes, f"shifted: {section.shift}, the devices' and the test samples"),
    )  # fmt: skip


def _image_axes(data: Dataset, shape: tuple[int, ...], *, channels_last: bool) -> tuple[int, int]:
    """The axes of x (n, *shape) that are an image's rows and columns."""
    axes = image_axes(shape, channels_last=channels_last)
    if len(shape) < 2 or shape[axes[0]] != shape[axes[1]]:
        raise DataError(
            f"{data.name}: data.shift rotate90 needs images with equal sides, samples have shape "
            f"{shape}"
        )
    return axes


def _inverted(x: Array, low: float, high: float) -> Array:
    # Integers up to 2 ** 53 are exact; those of a test sample beyond the extremes are cut to them.
    inverted: Array = np.clip(low + high - x.astype(np.float64), low, high).astype(x.dtype)
    return inverted


def _gains(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Log-normal factors (*shape), always the same ones."""
    normal = np.random.default_rng(_GAIN_SEED).standard_normal(shape)
    return np.exp(_GAIN_DEVIATION * normal).astype(np.float32)
