"""Data sets by name or path: `digits`, .npz, IDX files, images by class, CSV of sensor windows.

docs/data.md shows each.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from server_node.idx import is_idx_folder, read_idx_folder
from server_node.samples import (
    TEST_FRACTION,
    Dataset,
    Draw,
    check_dataset,
    hold_out,
    lend,
    mirror,
    seeded_order,
    withhold,
)
from server_node.sections import DataSection
from server_node.sensor_csv import read_sensor_csv
from server_node.shift import shift
from wire_protocol.errors import InputError
from wire_protocol.npz import input_arrays, parse_npz

_NPZ_ARRAYS: Final = ("x_train", "y_train", "x_test", "y_test")
_DIGITS_FILE: Final = "datasets/data/digits.csv.gz"


def load_dataset(section: DataSection) -> Dataset:
    """Load what `section` names: hold-out, public samples, shift and mirror applied; raw.

    Raises DataError.
    """
    data = _load(section)
    if section.holdout:
        data = hold_out(data, section.holdout)
    if section.public_source:
        other = msgspec.structs.replace(section, source=section.public_source)
        data = lend(data, _load(other), section.public)
    elif section.public:
        data = withhold(data, section.public)
    if section.shift != "none":
        data = shift(data, section)
    return mirror(data, channels_last=section.channels_last) if section.mirror else data


def _load(section: DataSection) -> Dataset:
    path = Path(section.source)
    if section.source == "digits":
        dataset = _digits()
    elif path.is_dir():
        dataset = read_idx_folder(path) if is_idx_folder(path) else _image_folder(path)
    elif path.suffix.lower() == ".npz":
        dataset = _npz(path)
    elif path.suffix.lower() == ".csv":
        dataset = read_sensor_csv(path, section)
    else:
        missing = "" if path.exists() else " (no such file or folder)"
        raise DataError(
            f"data {section.source!r}{missing}: use 'digits', an .npz with "
            f"{', '.join(_NPZ_ARRAYS)}, a folder of IDX files, a folder of images by class, or a "
            ".csv of sensor readings"
        )
    check_dataset(dataset)
    return dataset


def _digits() -> Dataset:
    table = _digits_table()
    x, y = table[:, :-1].astype(np.uint8), table[:, -1].astype(np.int64)
    order = seeded_order(Draw.DIGITS, len(y))
    test = round(len(y) * TEST_FRACTION)
    x, y = x[order], y[order]
    return Dataset("digits", [x[test:]], y[test:], [x[:test]], y[:test])


def _digits_table() -> NDArray[np.float64]:
    """Rows of 64 pixels and the label, from scikit-learn's folder: importing it takes seconds."""
    package = importlib.util.find_spec("sklearn")
    folders = package.submodule_search_locations if package is not None else None
    try:
        if not folders:
            raise FileNotFoundError("sklearn")
        with gzip.open(Path(folders[0]) / _DIGITS_FILE, "rt", encoding="utf-8") as file:
            return np.loadtxt(file, delimiter=",")
    except OSError as error:
        raise DataError(
            "data 'digits': needs scikit-learn; pip install 'musplit[emulation]'"
        ) from error


def _image_folder(path: Path) -> Dataset:
    from server_node.image_folder import (  # noqa: PLC0415 - Pillow is for images alone
        read_image_folder,
    )

    return read_image_folder(path)


def _npz(path: Path) -> Dataset:
    try:
        with path.open("rb") as file:
            arrays = parse_npz(file, _NPZ_ARRAYS, str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise DataError(str(error)) from error
    y_train, y_test = (_labels(f"{path}: {name}", arrays[name]) for name in ("y_train", "y_test"))
    names = arrays.get("classes", np.empty(0))
    return Dataset(
        str(path), input_arrays(arrays, "x_train"), y_train, input_arrays(arrays, "x_test"), y_test,
        tuple(map(str, names)) if names.ndim == 1 and names.dtype.kind == "U" else (),
    )  # fmt: skip


def _labels(where: str, y: NDArray[np.generic]) -> NDArray[np.int64]:
    """Labels (n,) as class numbers; the common other forms are named with their remedy."""
    remedy = ""
    if y.ndim == 2 and y.shape[1] == 1:
        remedy = "; a column of labels? store y.ravel()"
    elif y.ndim == 2:
        remedy = "; one-hot? store y.argmax(axis=1)"
    elif y.ndim == 1 and y.dtype.kind in "fb":
        remedy = "; store y.astype(np.int64)"
    if y.ndim != 1 or y.dtype.kind not in "ui":
        raise DataError(f"{where} must be one integer a sample, is {y.dtype} {y.shape}{remedy}")
    return y.astype(np.int64)
