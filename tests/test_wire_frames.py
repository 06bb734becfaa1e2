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
    "4d555346 02 01 01 00 02 01 00 00"  # MUSF, version 2, activation, float32, raw, 2 dimensions,
    "c63cce4a"  # labels of 1 byte; CRC-32 of all that follows
    "0807060504030201 1817161514131211 24232221 00000000"  # run, epoch, round, first k
    "01000000 00000000"  # one label, no channels
    "01000000 02000000 00000000 00000000 00000000 00000000"  # 1 x 2
    "0000803f 000000c0 07"  # 1.0, -2.0, label 7
)
DIFFERENCES = SMALL._replace(
    kind=FrameKind.DIFFERENCES, first_k=6, labels=np.empty(0, np.uint32),
    tensor=np.array([[[1, -2]], [[0.5, 0.004]]], np.float32),
)  # fmt: skip
# Run, epoch, round and the CRC apart as above: header from dtype to ndim.., and the body.
GOLDEN_BODIES = {
    "float16": (SMALL._replace(encoding="float16"), "02000201 0000", 0, "00000039 007000f4 07"),
    "int8": (SMALL._replace(encoding="int8"), "04000201 0100", 2, "0402813c 4081 80 07"),
    "float16 differences": (
        DIFFERENCES._replace(encoding="float16"), "02000300 0000", 0,
        "00000039 00000038 007000f4 00741958",
    ),
    "int8 differences": (
        DIFFERENCES._replace(encoding="int8"), "03000300 0200", 2,
        "0402813c 0402813b 4081 7f01",
    ),
    "float32 in zstd": (
        SMALL._replace(
            tensor=np.zeros((8, 64), np.float32), labels=np.arange(8, dtype=np.uint32) * 100
        ),
        "01010202 0000", 0,
        "28b52ffd601007bd00008000006400c8002c019001f4015802bc020100fdff000b",
    ),
}  # fmt: skip
HUGE = 0xFFFFFFFF
NO_LABELS = np.empty(0, np.uint32)
WIDE = np.random.default_rng(0).standard_normal((3, 8, 20), np.float32)
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


@pytest.mark.parametrize(
    ("frame", "header", "group", "body"), GOLDEN_BODIES.values(), ids=GOLDEN_BODIES.keys()
)
def test_golden_bodies(frame: Frame, header: str, group: int, body: str) -> None:
    payload = encode_frame(frame, compressed=header.startswith("0101"))
    assert payload[6:12] == bytes.fromhex(header)
    assert payload[44:48] == words(group)
    assert payload[HEADER_BYTES:] == bytes.fromhex(body)
    got = decode_frame(payload)
    assert got.encoding == frame.encoding
    assert got.labels.tolist() == frame.labels.tolist()
    scale = np.abs(frame.tensor).max(axis=tuple(range(1, frame.tensor.ndim)), keepdims=True)
    assert (np.abs(got.tensor - frame.tensor) <= scale / 253).all()


def every_form() -> list[bytes]:
    """A small frame of each kind, encoding and compression that there is."""
    frames = [SMALL._replace(tensor=WIDE, labels=np.arange(3)), DIFFERENCES._replace(tensor=WIDE)]
    return [
        encode_frame(
            frame._replace(encoding=encoding, tensor=frame.tensor * keep),
            compressed=bool(keep == 0),
        )
        for frame in frames
        for encoding in ("float32", "float16", "int8")
        for keep in (1, 0)
    ]


FORMS = every_form()
FORM_NAMES = [f"{p[5]}-{p[6]}-{p[7]}" for p in FORMS]
every_form_of_frame = pytest.mark.parametrize("payload", FORMS, ids=FORM_NAMES)


@every_form_of_frame
def test_every_form_is_refused_when_cut_flipped_or_lengthened(payload: bytes) -> None:
    decode_frame(payload)
    for length in range(len(payload)):
        with pytest.raises(ProtocolError):
            decode_frame(payload[:length])
        cut = bytearray(payload[:length])
        if length >= HEADER_BYTES:  # under a checksum that is right
            cut[12:16] = words(zlib.crc32(cut[16:]))
            with pytest.raises(ProtocolError):
                decode_frame(bytes(cut))
    for extra in (b"\0", bytes(4096), payload[HEADER_BYTES:]):
        longer = bytearray(payload + extra)
        longer[12:16] = words(zlib.crc32(longer[16:]))
        with pytest.raises(HeaderError):
            decode_frame(bytes(longer))
    for byte in range(len(payload)):
        flipped = bytearray(payload)
        flipped[byte] ^= 1 << byte % 8
        with pytest.raises(ProtocolError):
            decode_frame(bytes(flipped))


@every_form_of_frame
@pytest.mark.parametrize(
    ("offset", "value"),
    [(6, b"\0"), (6, b"\5"), (7, b"\2"), (9, b"\3"), (9, b"\4"), (10, b"\7"), (11, b"\1"),
     (40, b"\xff\xff\xff\xff"), (44, b"\xff\0\0\0"), (48, b"\xff\xff\xff\x7f"), (56, b"\0\0\0\0")],
)  # fmt: skip
def test_every_form_is_refused_under_a_lying_header(
    payload: bytes, offset: int, value: bytes
) -> None:
    lying = bytearray(payload)
    lying[offset : offset + len(value)] = value
    lying[12:16] = words(zlib.crc32(lying[16:]))
    with pytest.raises(ProtocolError):
        decode_cheaply(bytes(lying))


def test_a_bomb_is_bounded_before_it_is_decompressed() -> None:
    bomb = encode_frame(SMALL._replace(tensor=np.zeros((4, 1 << 20), np.float32)), compressed=True)
    assert len(bomb) < 4096
    with pytest.raises(HeaderError, match="exceeds"):
        decode_frame(bomb, 1 << 20)
    with pytest.raises(HeaderError, match="exceeds 0"):
        decode_frame(bomb, 0)
    # A header that promises little, before a body that grows beyond it.
    lying = bytearray(bomb)
    lying[48:56] = words(1, 4096)
    lying[12:16] = words(zlib.crc32(lying[16:]))
    with pytest.raises(HeaderError, match="zstd"):
        decode_cheaply(bytes(lying))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_scales_that_are_none_are_refused(scale: float) -> None:
    payload = bytearray(encode_frame(DIFFERENCES._replace(encoding="int8")))
    struct.pack_into("<f", payload, HEADER_BYTES, scale)
    payload[12:16] = words(zlib.crc32(payload[16:]))
    with pytest.raises(HeaderError, match="scale"):
        decode_frame(bytes(payload))


SHAPES = {
    "mlp": (32, 32), "wide": (32, 1000), "odd": (7, 33), "one feature": (256, 1),
    "lenet": (32, 6, 14, 14), "transformer": (2, 16, 48), "video": (2, 3, 2, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("encoding", "kind", "error"),
    [("float16", 1, 2**-11), ("float16", 2, 2**-11), ("int8", 1, 1 / 4063), ("int8", 2, 1 / 253)],
)
def test_errors_stay_within_the_step_of_their_scale(shape, encoding, kind, error) -> None:
    """Channels and directions may differ by any factor: each has a scale of its own."""
    random = np.random.default_rng(1)
    shape = shape if kind == 1 else (4, *shape)
    tensor = random.standard_normal(shape, np.float32)
    if kind == 2:
        tensor *= np.float32(10.0) ** -np.arange(0, 32, 8).reshape(4, *[1] * (len(shape) - 1))
    frame = SMALL._replace(kind=FrameKind(kind), tensor=tensor, labels=NO_LABELS, encoding=encoding)
    got = decode_frame(encode_frame(frame))
    assert got.encoding == encoding
    axes = tuple(range(kind - 1, len(shape)))
    peak = np.abs(tensor).max(axis=axes, keepdims=True)
    assert (np.abs(got.tensor - tensor) <= peak * error).all()


def test_channels_have_scales_of_their_own() -> None:
    """An outlier in one channel costs the others nothing."""
    tensor = np.random.default_rng(1).standard_normal((64, 8), np.float32)
    tensor[:, 3] *= 1e6
    frame = SMALL._replace(tensor=tensor[None], kind=FrameKind.DIFFERENCES, labels=NO_LABELS)
    got = decode_frame(encode_frame(frame._replace(encoding="int8"))).tensor[0]
    assert np.abs(got - tensor)[:, 0].max() < 0.02


EXTREMES = {
    "zeros": np.zeros((4, 32), np.float32),
    "a zero channel": np.eye(32, dtype=np.float32) * 3,
    "denormals": np.full((4, 32), 1e-44, np.float32),
    "largest": np.full((4, 32), 3.4e38, np.float32),
    "all magnitudes": np.float32(10.0) ** np.linspace(-44, 38, 128).reshape(4, 32),
}


@pytest.mark.parametrize("tensor", EXTREMES.values(), ids=EXTREMES.keys())
@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_extreme_values_stay_finite_and_small_ones_go_to_zero(tensor, encoding) -> None:
    tensor = tensor.astype(np.float32)
    got = decode_frame(encode_frame(SMALL._replace(tensor=tensor, encoding=encoding)))
    assert got.encoding == encoding
    assert np.isfinite(got.tensor).all()
    assert (np.abs(got.tensor - tensor) <= max(np.abs(tensor).max() / 2000, 1e-35)).all()
    assert (got.tensor[tensor == 0] == 0).all()


@pytest.mark.parametrize("encoding", ["float16", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_an_encoding_cannot_hold_goes_as_float32(encoding, value) -> None:
    """The device lives on; the server refuses the value."""
    tensor = np.array([[1, value]], np.float32)
    got = decode_frame(encode_frame(SMALL._replace(tensor=tensor, encoding=encoding)))
    assert got.encoding == "float32"
    np.testing.assert_array_equal(got.tensor, tensor)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_int8_differences_take_at_most_0_30_of_float32(shape) -> None:
    tensor = np.random.default_rng(0).standard_normal((8, *shape), np.float32)
    frame = DIFFERENCES._replace(tensor=tensor)
    plain, packed = (len(encode_frame(frame._replace(encoding=e))) for e in ("float32", "int8"))
    assert packed <= (0.30 if plain >= 65536 else 0.35) * plain


@pytest.mark.parametrize(("largest", "width"), [(255, 1), (256, 2), (65535, 2), (65536, 4)])
def test_labels_take_the_bytes_that_the_largest_needs(largest: int, width: int) -> None:
    payload = encode_frame(SMALL._replace(labels=np.array([0, largest], np.uint32)))
    assert len(payload) == HEADER_BYTES + 8 + 2 * width
    assert decode_frame(payload).labels.tolist() == [0, largest]


def test_only_what_shrinks_is_compressed() -> None:
    noise = SMALL._replace(tensor=np.random.default_rng(0).standard_normal((64, 64), np.float32))
    for encoding, scarce in (("float32", 0.9), ("int8", 0.0)):
        frame = noise._replace(encoding=encoding)
        assert (encode_frame(frame, compressed=True)[7] == 1) == bool(scarce)
    half = noise._replace(tensor=np.maximum(noise.tensor, 0), encoding="int8")
    payload = encode_frame(half, compressed=True)
    assert payload[7] == 1
    assert len(payload) < 0.95 * len(encode_frame(half))
    np.testing.assert_array_equal(
        decode_frame(payload).tensor, decode_frame(encode_frame(half)).tensor
    )


def test_the_golden_frame_encodes_and_decodes_byte_for_byte() -> None:
    assert encode_frame(SMALL) == GOLDEN
    assert_same(decode_frame(GOLDEN), SMALL)
    assert len(GOLDEN) == HEADER_BYTES + 9


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
    "version 1": (HeaderError, forged((4, b"\1"))),
    "version 3": (HeaderError, forged((4, b"\3"))),
    "kind 0": (HeaderError, forged((5, b"\0"))),
    "kind 3": (HeaderError, forged((5, b"\3"))),
    "dtype 5": (HeaderError, forged((6, b"\5"))),
    "compression 2": (HeaderError, forged((7, b"\2"))),
    "compression where there is none": (HeaderError, forged((7, b"\1"))),
    "no label width": (HeaderError, forged((9, b"\0"))),
    "labels of 3 bytes": (HeaderError, forged((9, b"\3"))),
    "channels of float32": (HeaderError, forged((44, words(1)))),
    "a channel axis of float32": (HeaderError, forged((10, b"\1"))),
    "0 dimensions": (HeaderError, forged((8, b"\0"), (48, words(0, 0)))),
    "7 dimensions": (HeaderError, forged((8, b"\7"))),
    "255 dimensions": (HeaderError, forged((8, b"\xff"))),
    "1 dimension, two given": (HeaderError, forged((8, b"\1"))),
    "2 dimensions, sixth given": (HeaderError, forged((68, words(1)))),
    "first reserved": (HeaderError, forged((11, b"\1"))),
    "trailing byte": (HeaderError, forged(extra=b"\0")),
    "trailing kilobytes": (HeaderError, forged(extra=bytes(4096))),
    "fewer labels": (HeaderError, forged((40, words(0)))),
    "smaller tensor": (HeaderError, forged((52, words(1)))),
    "empty tensor": (HeaderError, forged((48, words(0)))),
    "one label more": (TruncatedError, forged((40, words(2)))),
    "huge label count": (TruncatedError, forged((40, words(HUGE)))),
    "one huge dimension": (TruncatedError, forged((52, words(HUGE)))),
    "six huge dimensions": (TruncatedError, forged((8, b"\6"), (48, words(*[HUGE] * 6)))),
    # 2**31 * 2**31 * 4 floats are 0 bytes in 64-bit arithmetic: then the labels fit.
    "dimensions that wrap to 0": (
        TruncatedError, forged((8, b"\3"), (40, words(9)), (48, words(1 << 31, 1 << 31, 4))),
    ),
    # No elements, so the sizes add up; but no array can have this shape.
    "empty tensor of huge dimensions": (
        HeaderError, forged((8, b"\3"), (40, words(9)), (48, words(0, HUGE, HUGE))),
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
    count = MAX_FRAME_BYTES // 4 + 1  # as float16 it fits, as float32 it would not
    form = (6, b"\2"), (9, b"\0"), (40, words(0)), (48, words(1, count))
    with pytest.raises(HeaderError, match="exceeds"):
        decode_cheaply(forged(*form, extra=bytes(4 + 2 * count - 9)))


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
    size = math.prod(dims) * 4 + label_count
    if size < 4096:
        body = body[:size].ljust(size, b"\0")
    header = forged(
        (8, bytes([len(dims)])),
        (9, bytes([label_count > 0])),
        (40, words(label_count)),
        (48, words(*dims, *[0] * (6 - len(dims)))),
    )
    payload = bytearray(header[:HEADER_BYTES] + body)
    payload[12:16] = words(zlib.crc32(payload[16:]))
    with contextlib.suppress(ProtocolError):
        assert decode_frame(payload).tensor.shape == tuple(dims)
