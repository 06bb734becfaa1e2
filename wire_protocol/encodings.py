"""How a tensor's numbers become bytes: float32, float16 and int8 with scales, and zstd on top.

Differences h+ - h- are taken in float32 before any of this; each direction has scales of its own,
so that a small difference keeps its digits whatever the size of the others.

float16 a power of two for each direction brings its largest value into [2^14, 2^15): the product
        is exact, nothing overflows, and what is lost is 2^-11 of each value.
int8    value = q * scale, q in -127..127, scale = largest absolute value / 127 of a group of
        adjacent channels. A group covers at least 64 values (if there are as many), so that the
        scales add at most a sixteenth to the bytes.
        An activation has four bits more, in a plane of their own: value = (q + r / 16) * scale,
        r in -8..7. The loss differences are taken around it, and with 8 bits they were wrong by
        2 % (MLP) to 6 % (LeNet) of their RMS; it goes once a round against K differences.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from backports import zstd
from numpy.typing import NDArray

from wire_protocol.errors import HeaderError

Encoding: TypeAlias = Literal["float32", "float16", "int8"]
Compression: TypeAlias = Literal["none", "zstd"]

# Fewer values a scale would cost more than a sixteenth of them.
MIN_VALUES_PER_SCALE: Final = 64
_LARGEST: Final = 127
# Steps of the refinement between two int8 values.
_STEPS: Final = 16
# float16 ends at 65504: 2^15 leaves a factor of two.
_FLOAT16_EXPONENT: Final = 15
# The smallest normal float32: below it 1 / scale would overflow.
_TINY: Final = np.float32(2.0**-126)
# Fast, and on activations within a few per cent of the default level's size.
_ZSTD_LEVEL: Final = 1
# The window of a zstd stream is memory of its receiver; levels up to 19 use at most this.
_ZSTD_WINDOW_LOG: Final = 23
# A receiver spends time on decompression: smaller savings are not worth it.
_WORTH_IT: Final = 0.95

Pieces: TypeAlias = list[NDArray[Any]]


class Layout(NamedTuple):
    """A tensor seen as (rows, outer, channels, inner), and how many channels share a scale.

    A row is a direction, or the whole activation. With S = max(1, channels // group) scales a
    row, channel c has scale min(c // group, S - 1): the last group takes what is left over.
    """

    rows: int
    outer: int
    channels: int
    inner: int
    group: int

    @property
    def scales(self) -> int:
        """Scales of one row."""
        return max(1, self.channels // self.group)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape to give the tensor."""
        return self.rows, self.outer, self.channels, self.inner

    def spread(self, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """One for each channel: scales (rows, S) -> (rows, 1, channels, 1)."""
        index = np.minimum(np.arange(self.channels) // self.group, self.scales - 1)
        return scales[:, np.newaxis, index, np.newaxis]


def layout(shape: tuple[int, ...], axis: int, group: int, *, per_direction: bool) -> Layout:
    """The layout of a tensor whose channels lie on `axis`, the first one being the batch's or k."""
    first = 1 if per_direction else 0
    return Layout(
        shape[0] if per_direction else 1, math.prod(shape[first:axis]), shape[axis],
        math.prod(shape[axis + 1 :]), group,
    )  # fmt: skip


def channel_axis(shape: tuple[int, ...], *, per_direction: bool) -> int | None:
    """The channels' axis: the last of (batch, sequence, feature), else the one after the batch.

    None when there is none.
    """
    batch = 1 if per_direction else 0
    dims = len(shape) - batch
    if dims < 2:
        return None
    return batch + 2 if dims == 3 else batch + 1


def channel_group(shape: tuple[int, ...], axis: int, *, per_direction: bool) -> int:
    """Channels a scale, so that it covers at least MIN_VALUES_PER_SCALE values."""
    whole = layout(shape, axis, 1, per_direction=per_direction)
    return min(whole.channels, -(-MIN_VALUES_PER_SCALE // (whole.outer * whole.inner)))


def encode_float16(tensor: NDArray[np.float32], rows: int) -> Pieces | None:
    """One scale a row, then float16; None when a value is not finite."""
    flat = tensor.reshape(rows, -1)
    peaks = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    if not np.isfinite(peaks).all():
        return None
    exponents = np.maximum(np.frexp(peaks)[1] - _FLOAT16_EXPONENT, -126)
    scales = np.ldexp(np.float32(1), exponents).astype("<f4")
    return [scales, (flat * (1 / scales)[:, np.newaxis]).astype("<f2")]


def decode_float16(scales: NDArray[np.float32], values: NDArray[np.float16]) -> NDArray[np.float32]:
    """The float32 values, flat; not finite where the bytes say so."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = values.reshape(len(scales), -1).astype(np.float32)
        scaled *= scales[:, np.newaxis]
    return scaled.reshape(-1)


def encode_int8(tensor: NDArray[np.float32], plan: Layout, *, refined: bool) -> Pieces | None:
    """Scales (rows, S), int8 and, when refined, the plane of r; None when a value is not finite."""
    x = tensor.reshape(plan.shape)
    peaks = np.maximum(x.max(axis=(1, 3)), -x.min(axis=(1, 3)))
    if not np.isfinite(peaks).all():
        return None
    starts = np.arange(plan.scales) * plan.group
    scales = (np.maximum.reduceat(peaks, starts, axis=1) / np.float32(_LARGEST)).astype("<f4")
    scales[scales < _TINY] = 0  # such values become 0
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = x * plan.spread(inverse)
    if not refined:
        np.rint(scaled, out=scaled)
        return [scales, scaled.astype(np.int8)]
    scaled *= _STEPS
    np.rint(scaled, out=scaled)
    fine = scaled.astype(np.int16).reshape(-1)
    coarse = (fine + _STEPS // 2) >> 4
    return [scales, coarse.astype(np.int8), _pack_nibbles(fine - coarse * _STEPS)]


def decode_int8(
    scales: NDArray[np.float32], values: NDArray[np.int8], plan: Layout,
    plane: NDArray[np.uint8] | None,
) -> NDArray[np.float32]:  # fmt: skip
    """The float32 values, flat; not finite where the scales say so."""
    spread = plan.spread(scales.reshape(plan.rows, plan.scales))
    q: NDArray[Any] = values
    if plane is not None:
        q = values * np.float32(1) + _unpack_nibbles(plane, values.size) / np.float32(_STEPS)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: NDArray[np.float32] = np.multiply(q.reshape(plan.shape), spread, dtype=np.float32)
    return scaled.reshape(-1)


def _pack_nibbles(rest: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Four bits for each r in -8..7 (n,): r + 8, the even element in the low ones."""
    nibbles = np.zeros(rest.size + rest.size % 2, np.uint8)
    nibbles[: rest.size] = rest + _STEPS // 2
    return nibbles[0::2] | nibbles[1::2] << np.uint8(4)


def _unpack_nibbles(plane: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    nibbles = np.empty(plane.size * 2, np.int8)
    nibbles[0::2] = plane & 15
    nibbles[1::2] = plane >> 4
    return nibbles[:count] - np.int8(_STEPS // 2)


def compress(body: bytes) -> bytes | None:
    """The body as one zstd frame (RFC 8878); None when that saves less than 5 %."""
    packed = zstd.compress(body, _ZSTD_LEVEL)
    return packed if len(packed) <= _WORTH_IT * len(body) else None


def decompress(packed: memoryview, size_bytes: int) -> bytes:
    """The body of exactly `size_bytes`; never allocates more. Raises HeaderError."""
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    decompressor = zstd.ZstdDecompressor(options=options)
    try:
        body = decompressor.decompress(packed, max_length=size_bytes + 1)
    except zstd.ZstdError as error:
        raise HeaderError(f"frame body is not zstd as agreed: {error}") from error
    if len(body) != size_bytes or not decompressor.eof or decompressor.unused_data:
        raise HeaderError(f"frame body is not one zstd frame of {size_bytes} bytes")
    return body
