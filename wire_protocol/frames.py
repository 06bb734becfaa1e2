"""Tensor frames: a fixed little-endian header of 72 bytes, then scales, tensor and labels.

offset size field
     0    4 magic "MUSF"
     4    1 version (2)
     5    1 kind: 1 activation, 2 differences, 4 cut gradient
     6    1 dtype: 1 float32, 2 float16, 3 int8, 4 int8 with a plane of 4 more bits
     7    1 compression: 0 raw, 1 zstd
     8    1 ndim, 1..6
     9    1 bytes of a label: 1, 2 or 4; 0 when there are none
    10    1 dtypes 3, 4: axis of the channels; else 0
    11    1 reserved, zero
    12    4 CRC-32 (zlib) of everything after this field
    16    8 run id
    24    8 session epoch
    32    4 round
    36    4 first k (differences), else 0
    40    4 label count
    44    4 dtypes 3, 4: channels that share a scale; else 0
    48   24 six dimensions, unused ones zero
    72      body: scales (float32), tensor (row-major), labels (unsigned);
            as it is, or as one zstd frame

All sizes follow from the header; a frame is accepted only when its length, or that of its
decompressed body, is exactly their sum. What the scales mean is told in encodings.py.
"""

from __future__ import annotations

import math
import struct
import zlib
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.encodings import (
    Encoding,
    Layout,
    Pieces,
    channel_axis,
    channel_group,
    compress,
    decode_float16,
    decode_int8,
    decompress,
    encode_float16,
    encode_int8,
    layout,
)
from wire_protocol.errors import ChecksumError, HeaderError, TruncatedError
from wire_protocol.mqtt_stream import Payload

MAGIC: Final = b"MUSF"
VERSION: Final = 2
MAX_DIMS: Final = 6
# One frame at most, as received and as float32; larger tensors are split by the sender (by k).
MAX_FRAME_BYTES: Final = 64 << 20
_HEADER: Final = struct.Struct("<4s8BIQQIIII6I")
HEADER_BYTES: Final = _HEADER.size
_CRC_END: Final = 16
_FLOAT32: Final = 1
_FLOAT16: Final = 2
_INT8: Final = 3
_INT8_REFINED: Final = 4
_ENCODINGS: Final[dict[int, Encoding]] = {
    _FLOAT32: "float32", _FLOAT16: "float16", _INT8: "int8", _INT8_REFINED: "int8",
}  # fmt: skip
_RAW: Final = 0
_ZSTD: Final = 1


class FrameKind(IntEnum):
    """What the tensor is."""

    ACTIVATION = 1  # (batch, *activation shape), with labels
    DIFFERENCES = 2  # (directions, batch, *activation shape): h+ - h-, from `first_k` on
    CUT_GRADIENT = 4  # (batch, *activation shape): dL/dh, from the server to a device


class Frame(NamedTuple):
    """One frame; decoded, a float32 `tensor` that came raw is a view of the received bytes."""

    kind: FrameKind
    run: int
    epoch: int
    round: int
    first_k: int
    tensor: NDArray[np.float32]
    labels: NDArray[np.uint32]
    encoding: Encoding = "float32"  # on the wire


class _Header(NamedTuple):
    """The header's fields, in its order; the sizes that follow from them."""

    magic: bytes
    version: int
    kind: int
    dtype: int
    compression: int
    ndim: int
    label_bytes: int
    axis: int
    reserved: int
    crc: int
    run: int
    epoch: int
    round: int
    first_k: int
    labels: int
    group: int
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dims[: self.ndim]

    @property
    def differences(self) -> bool:
        return self.kind == FrameKind.DIFFERENCES

    @property
    def plan(self) -> Layout | None:
        if self.dtype not in (_INT8, _INT8_REFINED):
            return None
        return layout(self.shape, self.axis, self.group, per_direction=self.differences)

    @property
    def scales(self) -> int:
        if self.dtype == _FLOAT16:
            return self.dims[0] if self.differences else 1
        plan = self.plan
        return plan.rows * plan.scales if plan else 0

    @property
    def tensor_bytes(self) -> int:
        count = math.prod(self.shape)
        return {
            _FLOAT32: count * 4, _FLOAT16: count * 2, _INT8: count,
            _INT8_REFINED: count + (count + 1) // 2,
        }[self.dtype]  # fmt: skip

    @property
    def body_bytes(self) -> int:
        return self.scales * 4 + self.tensor_bytes + self.labels * self.label_bytes


def encode_frame(frame: Frame, *, compressed: bool = False) -> bytes:
    """The bytes of a frame in its encoding; compressed only when that saves at least 5 %.

    A tensor that its encoding cannot hold (values that are not finite; int8 without a channel
    axis) goes as float32. Raises HeaderError when the frame does not fit the format.
    """
    tensor = np.ascontiguousarray(frame.tensor, "<f4")
    if not 1 <= tensor.ndim <= MAX_DIMS:
        raise HeaderError(f"a frame carries 1 to {MAX_DIMS} dimensions, not {tensor.ndim}")
    if HEADER_BYTES + tensor.nbytes > MAX_FRAME_BYTES:
        raise HeaderError(
            f"frame of {tensor.nbytes} bytes of float32 exceeds {MAX_FRAME_BYTES}: "
            "use a smaller batch"
        )
    dtype, axis, group, pieces = _encode_tensor(frame, tensor)
    labels = np.ascontiguousarray(frame.labels)
    label_bytes = _label_bytes(labels)
    if label_bytes:
        pieces.append(labels.astype(f"<u{label_bytes}"))
    body: list[Any] = list(pieces)
    packed = compress(b"".join(body)) if compressed else None
    if packed is not None:
        body = [packed]
    shape = (*tensor.shape, *(0,) * (MAX_DIMS - tensor.ndim))
    header = bytearray(HEADER_BYTES)
    try:
        _HEADER.pack_into(
            header, 0, MAGIC, VERSION, frame.kind, dtype,
            _RAW if packed is None else _ZSTD, tensor.ndim, label_bytes, axis, 0, 0,
            frame.run, frame.epoch, frame.round, frame.first_k, labels.size, group, *shape,
        )  # fmt: skip
    except struct.error as error:
        raise HeaderError(f"frame field out of range: {error}") from error
    crc = zlib.crc32(memoryview(header)[_CRC_END:])
    for piece in body:
        crc = zlib.crc32(piece, crc)
    struct.pack_into("<I", header, _CRC_END - 4, crc)
    payload = b"".join([header, *body])  # the one copy
    if len(payload) > MAX_FRAME_BYTES:
        raise HeaderError(f"frame of {len(payload)} bytes exceeds {MAX_FRAME_BYTES}")
    return payload


def _encode_tensor(frame: Frame, tensor: NDArray[np.float32]) -> tuple[int, int, int, Pieces]:
    """Dtype, channel axis, channels a scale, and the pieces of the body."""
    shape, differences = tensor.shape, frame.kind is FrameKind.DIFFERENCES
    pieces: Pieces | None = None
    if frame.encoding == "float16" and tensor.size:
        pieces = encode_float16(tensor, shape[0] if differences else 1)
        if pieces is not None:
            return _FLOAT16, 0, 0, pieces
    axis = channel_axis(shape, per_direction=differences)
    if frame.encoding == "int8" and tensor.size and axis is not None:
        group = channel_group(shape, axis, per_direction=differences)
        plan = layout(shape, axis, group, per_direction=differences)
        pieces = encode_int8(tensor, plan, refined=not differences)
        if pieces is not None:
            return _INT8 if differences else _INT8_REFINED, axis, group, pieces
    return _FLOAT32, 0, 0, [tensor]


def _label_bytes(labels: NDArray[Any]) -> int:
    """The smallest of 1, 2 and 4 bytes that holds every label; 0 for none."""
    if not labels.size:
        return 0
    largest = int(labels.max())
    return 1 if largest < 1 << 8 else 2 if largest < 1 << 16 else 4


def decode_frame(payload: Payload, compressed_max_bytes: int = MAX_FRAME_BYTES) -> Frame:
    """Check and decode a frame; nothing is allocated before its sizes are known to be true.

    A compressed frame may grow to `compressed_max_bytes`, 0: none is taken. Raises
    TruncatedError, HeaderError or ChecksumError.
    """
    view = memoryview(payload)
    if len(view) < HEADER_BYTES:
        raise TruncatedError(f"frame of {len(view)} bytes is shorter than its header")
    *fields, d0, d1, d2, d3, d4, d5 = _HEADER.unpack_from(view)
    header = _Header._make((*fields, (d0, d1, d2, d3, d4, d5)))
    _check_fields(header)
    _check_sizes(header, len(view), compressed_max_bytes)
    if zlib.crc32(view[_CRC_END:]) != header.crc:
        raise ChecksumError("frame checksum does not match: the payload was altered")
    body = view[HEADER_BYTES:]
    if header.compression == _ZSTD:
        body = memoryview(decompress(body, header.body_bytes))
    tensor, labels = _decode_body(body, header)
    return Frame(
        FrameKind(header.kind), header.run, header.epoch, header.round, header.first_k, tensor,
        labels, _ENCODINGS[header.dtype],
    )  # fmt: skip


def _check_fields(header: _Header) -> None:
    if header.magic != MAGIC or header.version != VERSION:
        raise HeaderError(
            f"frame starts with {header.magic!r} version {header.version}, not {MAGIC!r} {VERSION}"
        )
    if header.kind not in tuple(FrameKind):
        raise HeaderError(f"frame kind {header.kind} is unknown")
    if header.dtype not in _ENCODINGS or header.compression not in (_RAW, _ZSTD):
        raise HeaderError(
            f"frame dtype {header.dtype} with compression {header.compression} is unknown"
        )
    ndim, dims = header.ndim, header.dims
    if not 1 <= ndim <= MAX_DIMS or any(dims[ndim:]) or header.reserved:
        raise HeaderError(f"frame of {ndim} dimensions with shape {dims} is malformed")
    if 0 in header.shape:
        raise HeaderError(f"frame of shape {header.shape} is empty")
    if header.label_bytes not in ((1, 2, 4) if header.labels else (0,)):
        raise HeaderError(f"frame has {header.labels} labels of {header.label_bytes} bytes")
    axis, group = header.axis, header.group
    if header.dtype in (_FLOAT32, _FLOAT16):
        fits = not axis and not group
    else:
        first = 2 if header.differences else 1
        fits = first <= axis < ndim and 1 <= group <= dims[axis]
    if not fits:
        raise HeaderError(
            f"frame dtype {header.dtype} of shape {header.shape} cannot have {group} channels a "
            f"scale on axis {axis}"
        )


def _check_sizes(header: _Header, actual: int, compressed_max_bytes: int) -> None:
    promised = HEADER_BYTES + header.body_bytes
    if actual < promised and header.compression == _RAW:
        raise TruncatedError(f"frame has {actual} bytes, its header promises {promised}")
    largest = max(actual, promised, math.prod(header.shape) * 4)
    bound = MAX_FRAME_BYTES if header.compression == _RAW else compressed_max_bytes
    if largest > bound:
        raise HeaderError(f"frame of {largest} bytes exceeds {bound}")
    if actual > promised:
        raise HeaderError(f"frame has {actual} bytes, its header promises only {promised}")


def _decode_body(
    body: memoryview, header: _Header
) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    scales = np.frombuffer(body, "<f4", header.scales)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise HeaderError("frame with a scale that is negative or not finite")
    count, begin = math.prod(header.shape), header.scales * 4
    end = begin + header.tensor_bytes
    plan = header.plan
    if plan is not None:
        plane = np.frombuffer(body, np.uint8, end - begin - count, begin + count)
        values = np.frombuffer(body, np.int8, count, begin)
        flat = decode_int8(scales, values, plan, plane if len(plane) else None)
    elif header.dtype == _FLOAT16:
        flat = decode_float16(scales, np.frombuffer(body, "<f2", count, begin))
    else:
        flat = np.frombuffer(body, "<f4", count, begin)
    labels = np.frombuffer(body, f"<u{header.label_bytes or 4}", header.labels, end)
    return flat.reshape(header.shape), labels.astype(np.uint32)
