"""Tensor frames: exact bytes, and nothing wrong gets through or costs memory."""

from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire_protocol.errors import ChecksumError, HeaderError, ProtocolError, TruncatedError
from wire_protocol.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Frame,
    FrameKind,
    decode_frame,
    encode_frame,
)

SMALL = Frame(
    kind=FrameKind.ACTIVATION,
    run=0x0102030405060708,
    epoch=0x1112131415161718,
    round=0x21222324,
    first_k=0,
    tensor=np.array([[1.0, -2.0]], np.float32),
    labels=np.array([7], np.uint32),
)
GOLDEN = bytes.fromhex(
    "4d555346 01 01 01 00 02 000000"  # MUSF, version 1, activation, float32, raw, 2 dimensions
    "e2a54c65"  # CRC-32 of all that follows
    "0807060504030201 1817161514131211 24232221 00000000"  # run, epoch, round, first k
    "01000000 00000000"  # one label, reserved
    "01000000 02000000 00000000 00000000 00000000 00000000"  # 1 x 2
    "0000803f 000000c0 07000000"  # 1.0, -2.0, label 7
)
HUGE = 0xFFFFFFFF
NO_LABELS = np.empty(0, np.uint32)
FRAMES = {
    "activation": SMALL,
    "activation of an image": SMALL._replace(
        tensor=np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5),
        labels=np.array([0, HUGE], np.uint32),
    ),
    "differences": SMALL._replace(
        kind=FrameKind.DIFFERENCES, first_k=6, labels=NO_LABELS,
        tensor=np.array([[[np.nan, np.inf], [-0.0, 1e-42]]], np.float32),
    ),
    "six dimensions": SMALL._replace(tensor=np.ones((1, 2, 1, 2, 1, 2), np.float32)),
    "largest header fields": SMALL._replace(
        run=(1 << 64) - 1, epoch=(1 << 64) - 1, round=HUGE, first_k=HUGE
    ),
    "strided, big-endian": SMALL._replace(
        tensor=np.arange(12, dtype=">f4").reshape(3, 4).T[::2], labels=np.arange(4)[::-2]
    ),
}  # fmt: skip


def forged(*fields: tuple[int, bytes], extra: bytes = b"") -> bytes:
    """The golden frame with fields replaced and bytes appended, under a CRC that is right."""
    payload = bytearray(GOLDEN + extra)
    for offset, value in fields:
        payload[offset : offset + len(value)] = value
    payload[12:16] = struct.pack("<I", zlib.crc32(payload[16:]))
    return bytes(payload)


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def test_the_golden_frame_encodes_and_decodes_byte_for_byte() -> None:
    assert encode_frame(SMALL) == GOLDEN
    assert_same(decode_frame(GOLDEN), SMALL)
    assert len(GOLDEN) == HEADER_BYTES + 12


def assert_same(got: Frame, want: Frame) -> None:
    assert got[:5] == want[:5]
    assert isinstance(got.kind, FrameKind)
    assert (got.tensor.dtype, got.tensor.shape) == (np.dtype("<f4"), want.tensor.shape)
    assert got.tensor.tobytes() == want.tensor.astype("<f4").tobytes()
    assert got.labels.tolist() == want.labels.tolist()


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
@pytest.mark.parametrize("container", [bytes, memoryview])
def test_round_trip(frame: Frame, container: type) -> None:
    assert_same(decode_frame(container(encode_frame(frame))), frame)


def test_a_decoded_frame_is_a_view_of_the_payload() -> None:
    payload = encode_frame(SMALL._replace(tensor=np.ones((64, 256), np.float32)))
    frame = decode_frame(payload)
    assert np.shares_memory(frame.tensor, np.frombuffer(payload, np.uint8))
    assert np.shares_memory(frame.labels, np.frombuffer(payload, np.uint8))


@pytest.mark.parametrize("length", range(len(GOLDEN)))
def test_truncation_at_every_byte_is_refused(length: int) -> None:
    with pytest.raises(TruncatedError):
        decode_frame(GOLDEN[:length])


@pytest.mark.parametrize("byte", range(len(GOLDEN)))
def test_every_flipped_bit_is_refused(byte: int) -> None:
    for bit in range(8):
        payload = bytearray(GOLDEN)
        payload[byte] ^= 1 << bit
        with pytest.raises(ProtocolError):
            decode_frame(payload)


@pytest.mark.parametrize("byte", [12, 16, 24, 32, 36, HEADER_BYTES, len(GOLDEN) - 1])
def test_an_altered_byte_that_no_field_check_can_see_is_a_checksum_error(byte: int) -> None:
    payload = bytearray(GOLDEN)
    payload[byte] ^= 1
    with pytest.raises(ChecksumError, match="altered"):
        decode_frame(payload)


LIES = {
    "magic": (HeaderError, forged((0, b"MUSC"))),
    "version 0": (HeaderError, forged((4, b"\0"))),
    "version 2": (HeaderError, forged((4, b"\2"))),
    "kind 0": (HeaderError, forged((5, b"\0"))),
    "kind 3": (HeaderError, forged((5, b"\3"))),
    "dtype 2": (HeaderError, forged((6, b"\2"))),
    "encoding 1": (HeaderError, forged((7, b"\1"))),
    "0 dimensions": (HeaderError, forged((8, b"\0"), (48, words(0, 0)))),
    "7 dimensions": (HeaderError, forged((8, b"\7"))),
    "255 dimensions": (HeaderError, forged((8, b"\xff"))),
    "1 dimension, two given": (HeaderError, forged((8, b"\1"))),
    "2 dimensions, sixth given": (HeaderError, forged((68, words(1)))),
    "first reserved": (HeaderError, forged((11, b"\1"))),
    "second reserved": (HeaderError, forged((44, words(1)))),
    "trailing byte": (HeaderError, forged(extra=b"\0")),
    "trailing kilobytes": (HeaderError, forged(extra=bytes(4096))),
    "fewer labels": (HeaderError, forged((40, words(0)))),
    "smaller tensor": (HeaderError, forged((52, words(1)))),
    "empty tensor": (HeaderError, forged((48, words(0)))),
    "one label more": (TruncatedError, forged((40, words(2)))),
    "huge label count": (TruncatedError, forged((40, words(HUGE)))),
    "one huge dimension": (TruncatedError, forged((52, words(HUGE)))),
    "six huge dimensions": (TruncatedError, forged((8, b"\6"), (48, words(*[HUGE] * 6)))),
    # 2**31 * 2**31 * 4 floats are 0 bytes in 64-bit arithmetic: then the label fits.
    "dimensions that wrap to 0": (
        TruncatedError, forged((8, b"\3"), (40, words(3)), (48, words(1 << 31, 1 << 31, 4))),
    ),
    # No elements, so the sizes add up; but no array can have this shape.
    "empty tensor of huge dimensions": (
        HeaderError, forged((8, b"\3"), (40, words(3)), (48, words(0, HUGE, HUGE))),
    ),
}  # fmt: skip


def decode_cheaply(payload: bytes) -> Frame:
    tracemalloc.start()
    try:
        return decode_frame(payload)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@pytest.mark.parametrize(("error", "payload"), LIES.values(), ids=LIES.keys())
def test_a_lying_header_is_refused_without_an_allocation(
    error: type[ProtocolError], payload: bytes
) -> None:
    """The checksum is right: only the checks of the header can refuse these."""
    with pytest.raises(error):
        decode_cheaply(payload)


def test_an_oversize_frame_is_refused_on_both_sides() -> None:
    tensor = np.zeros((MAX_FRAME_BYTES - HEADER_BYTES) // 4 + 1, np.float32)
    with pytest.raises(HeaderError, match="smaller batch"):
        encode_frame(SMALL._replace(tensor=tensor, labels=NO_LABELS))
    with pytest.raises(HeaderError, match="exceeds"):
        decode_cheaply(GOLDEN.ljust(MAX_FRAME_BYTES + 1, b"\0"))


def test_the_largest_frame_is_accepted() -> None:
    tensor = np.zeros((MAX_FRAME_BYTES - HEADER_BYTES) // 4, np.float32)
    payload = encode_frame(SMALL._replace(tensor=tensor, labels=NO_LABELS))
    assert len(payload) == MAX_FRAME_BYTES
    assert decode_frame(payload).tensor.size == tensor.size


UNFIT = {
    "7 dimensions": {"tensor": np.ones((1,) * 7, np.float32)},
    "run beyond 64 bits": {"run": 1 << 64},
    "negative epoch": {"epoch": -1},
    "round beyond 32 bits": {"round": 1 << 32},
    "negative first k": {"first_k": -1},
}


@pytest.mark.parametrize("fields", UNFIT.values(), ids=UNFIT.keys())
def test_a_frame_that_does_not_fit_the_format_is_not_encoded(fields: dict) -> None:
    with pytest.raises(HeaderError):
        encode_frame(SMALL._replace(**fields))


FUZZ = settings(max_examples=150, deadline=None, database=None, derandomize=True)
DIMENSION = st.sampled_from([0, 1, 2, 3, 1 << 31, HUGE])


@FUZZ
@given(st.binary(max_size=200), st.integers(0, HEADER_BYTES))
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes, kept: int) -> None:
    """After any number of right bytes, so that every check is reached."""
    with pytest.raises(ProtocolError):
        decode_frame(GOLDEN[:kept] + data + b"\1")


@FUZZ
@given(st.lists(DIMENSION, min_size=1, max_size=6), st.integers(0, 8), st.binary(max_size=40))
def test_random_shapes_under_a_right_checksum_raise_nothing_but_protocol_errors(
    dims: list[int], label_count: int, body: bytes
) -> None:
    """The body is as long as the header promises, when that is less than 4 KiB."""
    size = (math.prod(dims) + label_count) * 4
    if size < 4096:
        body = body[:size].ljust(size, b"\0")
    header = forged(
        (8, bytes([len(dims)])),
        (40, words(label_count)),
        (48, words(*dims, *[0] * (6 - len(dims)))),
    )
    payload = bytearray(header[:HEADER_BYTES] + body)
    payload[12:16] = words(zlib.crc32(payload[16:]))
    with contextlib.suppress(ProtocolError):
        assert decode_frame(payload).tensor.shape == tuple(dims)
