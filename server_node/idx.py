"""Folders of IDX files, LeCun's format: two zero bytes, type, dimensions, sizes big-endian, data.

Read are bytes (type 8), plain or gzip-packed, as MNIST and Fashion-MNIST come.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from server_node.samples import Dataset

FILES: Final = tuple(
    f"{split}-{kind}"
    for split in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
_UINT8: Final = 0x08
_MAX_DIMS: Final = 5
_CHUNK_BYTES: Final = 1 << 20


def is_idx_folder(folder: Path) -> bool:
    """True when any of the four files is there, plain or packed."""
    return any((folder / f"{name}{end}").exists() for name in FILES for end in ("", ".gz"))


def read_idx_folder(folder: Path) -> Dataset:
    """The four files as a data set; images (n, H, W) uint8. Raises DataError."""
    x_train, y_train, x_test, y_test = (_read(folder, name) for name in FILES)
    return Dataset(
        str(folder), [x_train], y_train.astype(np.int64), [x_test], y_test.astype(np.int64)
    )


def _read(folder: Path, name: str) -> NDArray[np.uint8]:
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    try:
        with path.open("rb") as file:
            return _parse(gzip.GzipFile(fileobj=file) if path is packed else file, path)
    except FileNotFoundError as error:
        raise DataError(
            f"{plain}: no such file (nor .gz); an IDX folder holds {', '.join(FILES)}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _parse(file: io.BufferedIOBase, path: Path) -> NDArray[np.uint8]:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UINT8:
        raise DataError(f"{path}: not an IDX file of bytes")
    dims = head[3]
    if not 1 <= dims <= _MAX_DIMS:
        raise DataError(f"{path}: {dims} dimensions are none of a data set")
    sizes = file.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise DataError(f"{path}: truncated in its header")
    shape = struct.unpack(f">{dims}I", sizes)
    # In pieces, and no further than promised: neither a lying header nor a packed bomb takes more
    # memory than the file fills.
    count = math.prod(shape)
    body = bytearray()
    while len(body) <= count and (chunk := file.read(min(_CHUNK_BYTES, count + 1 - len(body)))):
        body += chunk
    if len(body) != count:
        have = f"more than {count}" if len(body) > count else f"{len(body)}"
        raise DataError(f"{path}: {have} values, its header promises {'x'.join(map(str, shape))}")
    return np.frombuffer(body, np.uint8).reshape(shape)
