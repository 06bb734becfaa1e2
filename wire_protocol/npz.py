"""Reading npz archives from outside, without pickle: a file in, arrays or one error out."""

from __future__ import annotations

import itertools
import struct
import zipfile
import zlib
from typing import IO, Any, Final

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from wire_protocol.errors import InputError

# What numpy, zipfile and zlib raise on damaged or odd archives (found by truncating and flipping).
_DAMAGE: Final = (
    OSError, ValueError, EOFError, TypeError, KeyError, AttributeError, RuntimeError,
    MemoryError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Names that an error lists.
_NAMED: Final = 8


def parse_npz(file: IO[bytes], names: tuple[str, ...], where: str) -> dict[str, NDArray[Any]]:
    """All arrays of an open archive; those in `names` must be there. Raises InputError.

    Read in pieces: beside the arrays nothing of their size is held.
    """
    try:
        archive = np.load(file, allow_pickle=False)
        files = archive.files if isinstance(archive, NpzFile) else []
        arrays = {name: archive[name] for name in files}
    except _DAMAGE as error:
        why = "objects, which would need pickle" if "pickle" in str(error) else _line(error)
        raise InputError(f"{where}: not a readable npz file ({why})") from error
    for name in names:
        if not isinstance(arrays.get(name), np.ndarray):
            there = ", ".join(map(repr, [*arrays][:_NAMED])) or "nothing"
            raise InputError(f"{where}: array {name!r} is missing; the file holds {there}")
    return arrays


def input_name(stem: str, index: int) -> str:
    """Name of the array that holds a model's input `index`: x, x_1, x_2, .."""
    return f"{stem}_{index}" if index else stem


def input_arrays(arrays: dict[str, NDArray[Any]], stem: str) -> list[NDArray[Any]]:
    """The arrays of all inputs, in order: `stem`, then `stem`_1 and so on as far as there are."""
    names = (input_name(stem, index) for index in itertools.count())
    return [arrays[name] for name in itertools.takewhile(arrays.__contains__, names)]


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
