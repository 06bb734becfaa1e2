"""A folder of images by class: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/* alone.

Classes are numbered by their sorted names. Without train/ and test/ a fifth of each class, always
the same, is the test set. Grey images become (H, W), colour images (3, H, W), bytes both.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from server_node.errors import DataError
from server_node.samples import TEST_FRACTION, Dataset, Draw, seeded_order

_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".pgm")
# Pillow's names of these formats; whatever else a file holds is not tried (EPS starts a program).
_FORMATS: Final = ("PNG", "JPEG", "BMP", "PPM")
_MODES: Final = {"L": "grey", "RGB": "RGB"}
# What Pillow raises on damaged files (found by truncating and flipping).
_DAMAGE: Final = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError,
                  OverflowError, MemoryError, Image.DecompressionBombError,
                  Image.DecompressionBombWarning)  # fmt: skip


class _Kind(NamedTuple):
    """What all images have in common: that of the first."""

    mode: str
    size: tuple[int, int]  # width, height

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        width, height = self.size
        return (3, height, width) if self.mode == "RGB" else (height, width)

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]} {_MODES[self.mode]}"


def read_image_folder(folder: Path) -> Dataset:
    """Decode all images below `folder`. Raises DataError naming the first file that does not fit.

    All names are checked before the first image is decoded. Folders are read to the depth of the
    two forms and no deeper, so that links cannot loop.
    """
    train, test, split = _train_and_test(folder)
    names = list(train)
    if len(names) < 2:
        raise DataError(f"{folder}: one class alone, {names[0]!r}; a folder a class is needed")
    unseen = sorted(set(test) - set(names))
    if unseen:
        raise DataError(f"{folder}: test/{unseen[0]} has no train/{unseen[0]}")
    x_train, y_train, kind = _decode(train, names, None)
    x_test, y_test, kind = _decode(test, names, kind)
    note = f"{len(y_train)} training and {len(y_test)} test images, {kind}, {len(names)} classes"
    return Dataset(
        str(folder), [x_train], y_train, [x_test], y_test, tuple(names), (f"{note}; {split}",)
    )


def _train_and_test(folder: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]], str]:
    """Files by class of both sets, and how they were told apart."""
    places = folder / "train", folder / "test"
    # A class may itself be called train: then it holds images, not folders.
    if any(place.is_dir() and _folders(place) for place in places):
        for place in places:
            if not place.is_dir():
                raise DataError(f"{place}: no such folder; train/ and test/ come together")
        others = [place.name for place in _folders(folder) if place not in places]
        left_out = f"; not read: {', '.join(others)}" if others else ""
        return _classes(places[0]), _classes(places[1]), f"split by train/ and test/{left_out}"
    files = _classes(folder)
    train, test = {}, {}
    for number, (name, paths) in enumerate(files.items()):
        if len(paths) < 2:
            raise DataError(f"{folder / name}: one image; training and test need one each")
        order = seeded_order(Draw.IMAGES, len(paths), number)
        held = max(1, round(len(paths) * TEST_FRACTION))
        test[name] = [paths[i] for i in sorted(order[:held])]
        train[name] = [paths[i] for i in sorted(order[held:])]
    return train, test, "a fifth of each class, always the same, is the test set"


def _classes(folder: Path) -> dict[str, list[Path]]:
    for path in _entries(folder):
        if path.suffix.lower() in _SUFFIXES and not path.is_dir():
            raise DataError(f"{path}: an image outside a class folder; move it into one")
    classes = {place.name: _images(place) for place in _folders(folder)}
    if not classes:
        raise DataError(
            f"{folder}: holds neither IDX files (train-images-idx3-ubyte ..) nor a folder of "
            "images for each class"
        )
    return classes


def _images(folder: Path) -> list[Path]:
    paths = _entries(folder)
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path}: a folder inside a class folder; images lie in CLASS/ itself")
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            raise DataError(
                f"{path}: not an image file ({' '.join(_SUFFIXES)}); remove it from the class"
            )
    if not paths:
        raise DataError(f"{folder}: a class without images; remove the folder, or fill it")
    return paths


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _decode(
    classes: dict[str, list[Path]], names: list[str], kind: _Kind | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64], _Kind]:
    """Images (n, *shape), class numbers (n,), and the kind that all of them are."""
    files = [(path, names.index(name)) for name, paths in classes.items() for path in paths]
    labels = np.array([label for _, label in files], np.int64)
    kind = kind or _open(files[0][0], None)[1]
    shape = (len(files), *kind.shape)
    try:
        x = np.empty(shape, np.uint8)
    except MemoryError as error:
        gigabytes = np.prod(shape, dtype=np.float64) / 1e9
        raise DataError(
            f"{files[0][0].parent.parent}: {len(files)} images of {kind} are {gigabytes:.0f} GB; "
            "make them smaller"
        ) from error
    for row, (path, _) in enumerate(files):
        pixels, _ = _open(path, kind)
        x[row] = pixels.transpose(2, 0, 1) if kind.mode == "RGB" else pixels
    return x, labels, kind


def _open(path: Path, expected: _Kind | None) -> tuple[NDArray[np.uint8], _Kind]:
    """Pixels (H, W) or (H, W, 3) and kind of one file; not decoded unless of the expected kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                kind = _check_kind(path, image, expected)
                return np.asarray(image), kind
    except _DAMAGE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not a readable image ({reason}); remove or replace it") from error


def _check_kind(path: Path, image: Any, expected: _Kind | None) -> _Kind:
    if image.mode not in _MODES:
        raise DataError(
            f"{path}: pixels of Pillow's mode {image.mode}; convert the image to grey (L) or RGB"
        )
    kind = _Kind(image.mode, image.size)
    if expected is not None and kind != expected:
        raise DataError(f"{path}: {kind}, the first image is {expected}; resize or convert it")
    return kind
