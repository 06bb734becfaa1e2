"""Data sets by name or path: `digits`, an npz file, or a folder of IDX files; and their splits."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from wire_protocol.directions import DirectionId, Stream, permutation
from wire_protocol.errors import InputError
from wire_protocol.manifest import Transform
from wire_protocol.npz import input_arrays, parse_npz

# The split of `digits`, and the hold-out, do not follow the run's seed: runs stay comparable.
_SPLIT_SEED: Final = 2510_21155
_DIGITS_TEST_FRACTION: Final = 0.2
_NPZ_ARRAYS: Final = ("x_train", "y_train", "x_test", "y_test")
_IDX_UINT8: Final = 0x08
_IDX_MAX_DIMS: Final = 5


class Dataset(NamedTuple):
    """x[input] (n, *sample shape) as in the source, y (n,) class numbers; raw, not transformed."""

    name: str
    x_train: list[NDArray[np.generic]]
    y_train: NDArray[np.int64]
    x_test: list[NDArray[np.generic]]
    y_test: NDArray[np.int64]


def load_dataset(source: str, holdout: float = 0.0) -> Dataset:
    """Load a data set; `holdout` replaces the test set by that part of the training set.

    Raises DataError.
    """
    path = Path(source)
    if source == "digits":
        dataset = _digits()
    elif path.is_dir():
        dataset = _idx_folder(path)
    elif path.suffix == ".npz":
        dataset = _npz(path)
    else:
        raise DataError(
            f"data {source!r}: use 'digits', an .npz with {', '.join(_NPZ_ARRAYS)}, or a folder "
            "of IDX files"
        )
    _check(dataset)
    return _hold_out(dataset, holdout) if holdout else dataset


def fit_transform(x_train: NDArray[np.generic], standardise: str) -> Transform:
    """Mean and standard deviation of the training inputs: of all, or of each feature.

    A constant feature keeps its scale.
    """
    if standardise == "none":
        return Transform()
    flat = x_train.reshape(len(x_train), -1).astype(np.float64)
    axis = 0 if standardise == "feature" else None
    low, mean = np.atleast_1d(flat.min(axis=axis)), np.atleast_1d(flat.mean(axis=axis))
    constant = low == np.atleast_1d(flat.max(axis=axis))
    mean = np.where(constant, low, mean)  # rounding would make a constant vary
    std = np.where(constant, 1.0, np.atleast_1d(flat.std(axis=axis)))
    return Transform(mean=_as_float32(mean), std=_as_float32(std))


def _as_float32(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in values.astype(np.float32)]


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only this data set needs it
    except ImportError as error:
        raise DataError(
            "data 'digits': needs scikit-learn; pip install 'musplit[emulation]'"
        ) from error
    x, y = load_digits(return_X_y=True)
    order = permutation(DirectionId(_SPLIT_SEED, Stream.BATCH, 0, 0, 0, 0), len(y))
    test = round(len(y) * _DIGITS_TEST_FRACTION)
    x, y = x.astype(np.uint8)[order], y.astype(np.int64)[order]
    return Dataset("digits", [x[test:]], y[test:], [x[:test]], y[:test])


def _npz(path: Path) -> Dataset:
    try:
        arrays = parse_npz(path.read_bytes(), _NPZ_ARRAYS, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise DataError(str(error)) from error
    y_train, y_test = arrays["y_train"], arrays["y_test"]
    x_train, x_test = input_arrays(arrays, "x_train"), input_arrays(arrays, "x_test")
    for name, labels in (("y_train", y_train), ("y_test", y_test)):
        if labels.dtype.kind not in "ui":
            raise DataError(f"{path}: {name} must be one integer a sample")
    return Dataset(str(path), x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64))


def _idx_folder(folder: Path) -> Dataset:
    arrays = [
        _idx_file(folder, f"{split}-{kind}")
        for split in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    x_train, y_train, x_test, y_test = arrays
    labels = y_train.astype(np.int64), y_test.astype(np.int64)
    return Dataset(str(folder), [x_train], labels[0], [x_test], labels[1])


def _idx_file(folder: Path, name: str) -> NDArray[np.uint8]:
    """An IDX file (LeCun's format: two zero bytes, type, dimensions, sizes big-endian), or .gz."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path is packed else data
    except FileNotFoundError as error:
        raise DataError(
            f"{plain}: no such file (nor .gz); an IDX folder holds four files"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _IDX_UINT8:
        raise DataError(f"{path}: not an IDX file of bytes")
    dims = data[3]
    if not 1 <= dims <= _IDX_MAX_DIMS:
        raise DataError(f"{path}: {dims} dimensions are none of a data set")
    if len(data) < 4 + 4 * dims:
        raise DataError(f"{path}: truncated in its header")
    shape = struct.unpack_from(f">{dims}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if body.size != np.prod(shape, dtype=np.int64):
        raise DataError(
            f"{path}: {body.size} values, its header promises {'x'.join(map(str, shape))}"
        )
    return body.reshape(shape)


def _check(data: Dataset) -> None:
    for xs, y, split in ((data.x_train, data.y_train, "train"), (data.x_test, data.y_test, "test")):
        for x in xs:
            if y.ndim != 1 or x.ndim < 1 or len(x) != len(y) or not len(y):
                raise DataError(f"{data.name}: x_{split} and y_{split} need one label a sample")
            if x.dtype.kind not in "buif" or not np.isfinite(x).all():
                raise DataError(f"{data.name}: x_{split} must be finite numbers")
        if y.min() < 0:
            raise DataError(f"{data.name}: y_{split} holds the label {y.min()}; labels start at 0")
    if [x.shape[1:] for x in data.x_train] != [x.shape[1:] for x in data.x_test]:
        raise DataError(f"{data.name}: x_train and x_test have different sample shapes")


def _hold_out(data: Dataset, holdout: float) -> Dataset:
    order = permutation(DirectionId(_SPLIT_SEED, Stream.BATCH, 1, 0, 0, 0), len(data.y_train))
    held = round(len(order) * holdout)
    if not 0 < held < len(order):
        raise DataError(f"{data.name}: data.holdout {holdout} leaves one side empty")
    test, train = order[:held], order[held:]
    xs, y = data.x_train, data.y_train
    name = f"{data.name}, held out {holdout}"
    return Dataset(name, [x[train] for x in xs], y[train], [x[test] for x in xs], y[test])
