"""Tensor frames: a fixed little-endian header of 72 bytes, the tensor, then the labels.

offset size field
     0    4 magic "MUSF"
     4    1 version (1)
     5    1 kind: 1 activation, 2 differences
     6    1 dtype: 1 float32
     7    1 encoding: 0 raw
     8    1 ndim, 1..6
     9    3 reserved, zero
    12    4 CRC-32 (zlib) of everything after this field
    16    8 run id
    24    8 session epoch
    32    4 round
    36    4 first k (differences), else 0
    40    4 label count
    44    4 reserved, zero
    48   24 six dimensions, unused ones zero
    72      tensor, row-major, product(shape) * 4 bytes; then label count * 4 bytes (uint32)

A frame is accepted only when these sizes add up to its length exactly.
"""

from __future__ import annotations

import math
import struct
import zlib
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.errors import ChecksumError, HeaderError, TruncatedError

MAGIC: Final = b"MUSF"
VERSION: Final = 1
MAX_DIMS: Final = 6
# One frame at most; larger tensors are split by the sender (differences: by k).
MAX_FRAME_BYTES: Final = 64 << 20
_HEADER: Final = struct.Struct("<4s5B3sIQQIIII6I")
HEADER_BYTES: Final = _HEADER.size
_CRC_END: Final = 16
_FLOAT32: Final = 1
_RAW: Final = 0


class FrameKind(IntEnum):
    """What the tensor is."""

    ACTIVATION = 1  # (batch, *activation shape), with labels
    DIFFERENCES = 2  # (directions, batch, *activation shape): h+ - h-, from `first_k` on


class Frame(NamedTuple):
    """One decoded frame; `tensor` and `labels` are views of the received bytes."""

    kind: FrameKind
    run: int
    epoch: int
    round: int
    first_k: int
    tensor: NDArray[np.float32]
    labels: NDArray[np.uint32]


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame. Raises HeaderError when it does not fit the format."""
    tensor = np.ascontiguousarray(frame.tensor, "<f4")
    labels = np.ascontiguousarray(frame.labels, "<u4")
    if not 1 <= tensor.ndim <= MAX_DIMS:
        raise HeaderError(f"a frame carries 1 to {MAX_DIMS} dimensions, not {tensor.ndim}")
    size = HEADER_BYTES + tensor.nbytes + labels.nbytes
    if size > MAX_FRAME_BYTES:
        raise HeaderError(f"frame of {size} bytes exceeds {MAX_FRAME_BYTES}: use a smaller batch")
    payload = bytearray(size)
    shape = (*tensor.shape, *(0,) * (MAX_DIMS - tensor.ndim))
    try:
        _HEADER.pack_into(
            payload, 0, MAGIC, VERSION, frame.kind, _FLOAT32, _RAW, tensor.ndim, b"\0\0\0", 0,
            frame.run, frame.epoch, frame.round, frame.first_k, labels.size, 0, *shape,
        )  # fmt: skip
    except struct.error as error:
        raise HeaderError(f"frame field out of range: {error}") from error
    body = np.frombuffer(payload, np.uint8, offset=HEADER_BYTES)
    body[: tensor.nbytes] = tensor.reshape(-1).view(np.uint8)
    body[tensor.nbytes :] = labels.reshape(-1).view(np.uint8)
    struct.pack_into("<I", payload, _CRC_END - 4, zlib.crc32(memoryview(payload)[_CRC_END:]))
    return bytes(payload)


def decode_frame(payload: bytes | memoryview) -> Frame:
    """Check and decode a frame; nothing is allocated before its sizes are known to be true.

    Raises TruncatedError, HeaderError or ChecksumError.
    """
    view = memoryview(payload)
    if len(view) < HEADER_BYTES:
        raise TruncatedError(f"frame of {len(view)} bytes is shorter than its header")
    if len(view) > MAX_FRAME_BYTES:
        raise HeaderError(f"frame of {len(view)} bytes exceeds {MAX_FRAME_BYTES}")
    # fmt: off
    (magic, version, kind, dtype, encoding, ndim, pad, crc,
     run, epoch, round_number, first_k, label_count, pad2, *dims) = _HEADER.unpack_from(view)
    # fmt: on
    if magic != MAGIC or version != VERSION:
        raise HeaderError(f"frame starts with {magic!r} version {version}, not {MAGIC!r} 1")
    if kind not in (FrameKind.ACTIVATION, FrameKind.DIFFERENCES):
        raise HeaderError(f"frame kind {kind} is unknown")
    if (dtype, encoding) != (_FLOAT32, _RAW):
        raise HeaderError(f"frame dtype {dtype} with encoding {encoding} is unknown")
    if not 1 <= ndim <= MAX_DIMS or any(dims[ndim:]) or any(pad) or pad2:
        raise HeaderError(f"frame of {ndim} dimensions with shape {dims} is malformed")
    shape = tuple(dims[:ndim])
    if 0 in shape:
        raise HeaderError(f"frame of shape {shape} is empty")
    tensor_bytes = math.prod(shape) * 4
    _check_size(len(view), HEADER_BYTES + tensor_bytes + label_count * 4)
    if zlib.crc32(view[_CRC_END:]) != crc:
        raise ChecksumError("frame checksum does not match: the payload was altered")
    tensor = np.frombuffer(view, "<f4", math.prod(shape), HEADER_BYTES).reshape(shape)
    labels = np.frombuffer(view, "<u4", label_count, HEADER_BYTES + tensor_bytes)
    return Frame(FrameKind(kind), run, epoch, round_number, first_k, tensor, labels)


def _check_size(actual: int, promised: int) -> None:
    if actual < promised:
        raise TruncatedError(f"frame has {actual} bytes, its header promises {promised}")
    if actual > promised:
        raise HeaderError(f"frame has {actual} bytes, its header promises only {promised}")
