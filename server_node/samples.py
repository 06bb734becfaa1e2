"""A data set in memory: training and test samples, what must hold of them, and seeded splits."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from wire_protocol.directions import DirectionId, Stream, permutation

# Splits do not follow the run's seed: runs stay comparable.
_SPLIT_SEED: Final = 2510_21155
# The part that becomes the test set where the source names none.
TEST_FRACTION: Final = 0.2
_LARGEST: Final = float(np.finfo(np.float32).max)


class Dataset(NamedTuple):
    """x[input] (n, *sample shape) as in the source, y (n,) class numbers; raw, not transformed."""

    name: str
    x_train: list[NDArray[np.generic]]
    y_train: NDArray[np.int64]
    x_test: list[NDArray[np.generic]]
    y_test: NDArray[np.int64]
    class_names: tuple[str, ...] = ()  # by class number; empty: the source has only numbers
    notes: tuple[str, ...] = ()  # what was made of the source, for people
    # Samples that the server may know: withheld from all devices, shaped like x_train; or none.
    x_public: tuple[NDArray[np.generic], ...] = ()
    y_public: NDArray[np.int64] = np.empty(0, np.int64)
    # Axis of x_train[0] along which a device holds each of its samples mirrored too; 0: none.
    mirror_axis: int = 0


class Draw(IntEnum):
    """What a seeded order is for; no two draws are the same."""

    DIGITS = 0
    HOLDOUT = 1
    IMAGES = 2
    RECORDINGS = 3
    PUBLIC = 4


def seeded_order(draw: Draw, count: int, part: int = 0) -> NDArray[np.int64]:
    """0 .. count - 1 in an order that is always the same for a draw and its part."""
    return permutation(DirectionId(_SPLIT_SEED, Stream.BATCH, draw, part, 0, 0), count)


def check_dataset(data: Dataset) -> None:
    """Raise DataError unless samples are finite numbers that float32 holds, with one label each."""
    for xs, y, split in ((data.x_train, data.y_train, "train"), (data.x_test, data.y_test, "test")):
        for x in xs:
            if y.ndim != 1 or x.ndim < 1 or len(x) != len(y) or not len(y):
                raise DataError(
                    f"{data.name}: x_{split} and y_{split} need one label a sample, not shapes "
                    f"{x.shape} and {y.shape}"
                )
            if not _usable(x):
                raise DataError(f"{data.name}: x_{split} must be finite numbers that float32 holds")
        if y.min() < 0:
            raise DataError(f"{data.name}: y_{split} holds the label {y.min()}; labels start at 0")
    if [x.shape[1:] for x in data.x_train] != [x.shape[1:] for x in data.x_test]:
        raise DataError(f"{data.name}: x_train and x_test have different sample shapes")


def hold_out(data: Dataset, holdout: float) -> Dataset:
    """The same with the test set replaced by a part of the training set. Raises DataError."""
    order = seeded_order(Draw.HOLDOUT, len(data.y_train))
    held = round(len(order) * holdout)
    if not 0 < held < len(order):
        raise DataError(f"{data.name}: data.holdout {holdout} leaves one side empty")
    test, train = order[:held], order[held:]
    xs, y = data.x_train, data.y_train
    return data._replace(
        name=f"{data.name}, held out {holdout}",
        x_train=[x[train] for x in xs], y_train=y[train],
        x_test=[x[test] for x in xs], y_test=y[test],
        notes=(*data.notes, f"held out: {held} of {len(order)} training samples are the test set"),
    )  # fmt: skip


def withhold(data: Dataset, count: int) -> Dataset:
    """The same with `count` training samples public, which no device gets. Raises DataError."""
    samples = len(data.y_train)
    if count >= samples:
        raise DataError(f"{data.name}: data.public {count} leaves none of {samples} samples")
    order = seeded_order(Draw.PUBLIC, samples)
    public, private = order[:count], order[count:]
    xs, y = data.x_train, data.y_train
    note = f"public: {count} of {samples} training samples, withheld from all devices"
    return data._replace(
        x_train=[x[private] for x in xs], y_train=y[private],
        x_public=tuple(x[public] for x in xs), y_public=y[public], notes=(*data.notes, note),
    )  # fmt: skip


def lend(data: Dataset, other: Dataset, count: int) -> Dataset:
    """The same with `count` training samples of `other` as the public ones; 0: all of them.

    Raises DataError when they are shaped differently.
    """
    shapes = [[x.shape[1:] for x in xs] for xs in (data.x_train, other.x_train)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"data.public_source: samples of {other.name} have shapes {shapes[1]}, those of "
            f"{data.name} {shapes[0]}"
        )
    order = seeded_order(Draw.PUBLIC, len(other.y_train))[: count or None]
    note = f"public: {len(order)} samples of {other.name}"
    return data._replace(
        x_public=tuple(x[order] for x in other.x_train), y_public=other.y_train[order],
        notes=(*data.notes, note),
    )  # fmt: skip


def image_axes(shape: tuple[int, ...], *, channels_last: bool) -> tuple[int, int]:
    """The axes, from the end, that are rows and columns of an image of this shape."""
    return (-3, -2) if channels_last and len(shape) > 2 else (-2, -1)


def mirror(data: Dataset, *, channels_last: bool) -> Dataset:
    """The same, but a device holds its images mirrored left to right too. Raises DataError."""
    x = data.x_train[0]
    if x.ndim < 3:
        raise DataError(f"{data.name}: data.mirror needs images, samples have shape {x.shape[1:]}")
    _, columns = image_axes(x.shape[1:], channels_last=channels_last)
    note = "mirrored: devices hold each of their images left to right too"
    return data._replace(mirror_axis=x.ndim + columns, notes=(*data.notes, note))


def shard_samples(
    data: Dataset, part: NDArray[np.int64]
) -> tuple[list[NDArray[np.generic]], NDArray[np.int64]]:
    """x[input] and y of the device that is dealt these training samples."""
    xs, y = [x[part] for x in data.x_train], data.y_train[part]
    if data.mirror_axis:
        xs = [
            np.concatenate([xs[0], np.flip(xs[0], data.mirror_axis)]),
            *(np.concatenate([x, x]) for x in xs[1:]),
        ]
        y = np.concatenate([y, y])
    return xs, y


def _usable(x: NDArray[np.generic]) -> bool:
    if x.dtype.kind not in "buif" or not x.size:
        return False
    # Extremes instead of isfinite: no second array of the data's size; nan compares as false.
    return x.dtype.kind != "f" or bool(x.min() >= -_LARGEST and x.max() <= _LARGEST)
