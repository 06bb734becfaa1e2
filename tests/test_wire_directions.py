"""Directions: the same bits everywhere, at any offset, on either library."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server_node.torch_directions import torch_add_scaled, torch_words
from wire_protocol.directions import (
    DirectionGenerator,
    DirectionId,
    Stream,
    batch_indices,
    directions_digest,
    participants,
    permutation,
)

MASK = (1 << 64) - 1
ORIGIN = DirectionId(0, Stream.CLIENT_HALF, 0, 0, 0, 0)
# The first 128 packed signs as bytes of the little-endian words: a set bit is -1, LSB first.
GOLDEN = {
    ORIGIN: "9bd8e40864baf402b2c5a89c0b2bd63d",
    ORIGIN._replace(run_seed=1): "df8262757ba2b64d2f0ebeba03fa44d9",
    ORIGIN._replace(half=Stream.SERVER_HALF): "f3a60719cba1f2686131a0b02d246ca5",
    ORIGIN._replace(device=1): "76d1a1f9c3f837d06507214c9b4157c0",
    ORIGIN._replace(round=1): "bed3f9222d3fe26e5212b1e580bb9f89",
    ORIGIN._replace(step=1): "6ea21bf8546d3c361eb0e03dc9022e37",
    ORIGIN._replace(k=1): "776f20b17f60c5a401f2df8bc55e4310",
}
EXTREME = [
    DirectionId(MASK, Stream.SERVER_HALF, (1 << 32) - 1, (1 << 32) - 1, (1 << 32) - 1, 3),
    DirectionId(1 << 63, Stream.CLIENT_HALF, 1 << 31, 1 << 31, 1 << 31, (1 << 32) - 1),
    DirectionId(20260101, Stream.SERVER_HALF, 7, 123, 4, 5),
]
SIZES = [1, 7, 255, 256, 257, 65536, 65537, 200003]


def philox_words(direction: DirectionId, first_block: int, blocks: int) -> list[int]:
    """Philox4x64-10 in Python integers: an implementation that shares nothing with numpy's."""
    words: list[int] = []
    for block in range(first_block, first_block + blocks):
        counter = [block + 1, direction.round << 32 | direction.step, direction.k, 0]
        key = [direction.run_seed, direction.half << 32 | direction.device]
        for _ in range(10):
            product0 = 0xD2E7470EE14C6C93 * counter[0]
            product1 = 0xCA5A826395121157 * counter[2]
            counter = [
                (product1 >> 64) ^ counter[1] ^ key[0],
                product1 & MASK,
                (product0 >> 64) ^ counter[3] ^ key[1],
                product0 & MASK,
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
        words += counter
    return words


def philox_signs(direction: DirectionId, start: int, stop: int) -> NDArray[np.float32]:
    first = start // 256
    words = philox_words(direction, first, -(-stop // 256) - first)
    bits = [word >> bit & 1 for word in words for bit in range(64)]
    return np.array([1 - 2 * bit for bit in bits], np.float32)[start - first * 256 :][
        : stop - start
    ]


def vector(size: int) -> NDArray[np.float32]:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    values[::5] = 0.0  # where even a subnormal addend shows
    return values


@pytest.mark.parametrize(("direction", "packed"), GOLDEN.items())
def test_golden_sign_bits(direction: DirectionId, packed: str) -> None:
    signs = DirectionGenerator().signs(direction, 0, 128)
    assert np.packbits(signs < 0, bitorder="little").tobytes().hex() == packed


def test_every_field_alone_changes_the_direction() -> None:
    assert len(set(GOLDEN.values())) == len(GOLDEN) == 7
    assert {sum(a != b for a, b in zip(ORIGIN, other, strict=True)) for other in GOLDEN} == {0, 1}


@pytest.mark.parametrize("direction", [*GOLDEN, *EXTREME])
def test_words_are_those_of_a_philox_written_from_the_paper(direction: DirectionId) -> None:
    """Counter and key are packed as the module's docstring says, the + 1 included."""
    words = DirectionGenerator().words(direction, 3, 5)
    assert words.tolist() == philox_words(direction, 3, 5)


@pytest.mark.parametrize("direction", EXTREME)
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 0), (0, 1), (1, 2), (255, 257), (65_535, 65_537), (65_791, 131_073), (131_071, 140_001)],
)
def test_a_slice_is_that_part_of_the_whole(direction: DirectionId, start: int, stop: int) -> None:
    generator = DirectionGenerator()
    whole = generator.signs(direction, 0, 140_001)
    part = generator.signs(direction, start, stop)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("start", [0, 13, 2**16 - 3, 2**40 - 77, 2**40 + 255])
def test_signs_at_any_offset_match_the_reference(start: int) -> None:
    got = DirectionGenerator().signs(EXTREME[2], start, start + 300)
    np.testing.assert_array_equal(got, philox_signs(EXTREME[2], start, start + 300))


def test_one_generator_serves_directions_in_any_order() -> None:
    """Nothing of an earlier call is left in a later one, an unaligned earlier call included."""
    generator = DirectionGenerator()
    want = {d: DirectionGenerator().signs(d, 5, 700) for d in EXTREME}
    for direction in [*EXTREME, *reversed(EXTREME)]:
        generator.signs(direction, 3, 9)
        np.testing.assert_array_equal(generator.signs(direction, 5, 700), want[direction])


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (5, 4)])
def test_a_backward_slice_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="forward slice"):
        DirectionGenerator().signs(ORIGIN, start, stop)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-3, -0.37, 1e-41, 0.0, -0.0, -1e-60])
def test_add_scaled_is_one_rounded_addition_an_element(size: int, scale: float) -> None:
    generator = DirectionGenerator()
    base = vector(size)
    base[1::5] = -0.0
    want = base + np.float32(scale) * generator.signs(EXTREME[0], 0, size)
    octets = generator.signs_packed(EXTREME[0], size)
    assert octets.shape == (-(-size // 8),)
    packed = np.full_like(base, np.nan)
    generator.add_packed(octets, -scale, base, packed)
    generator.add_packed(octets, scale, base, packed)
    assert packed.tobytes() == want.tobytes()
    out = np.full_like(base, np.nan)
    untouched = base.copy()
    generator.add_scaled(EXTREME[0], scale, base, out)
    assert out.tobytes() == want.tobytes()
    assert base.tobytes() == untouched.tobytes()
    generator.add_scaled(EXTREME[0], scale, base, base)
    assert base.tobytes() == want.tobytes()


@pytest.mark.parametrize("direction", [ORIGIN, *EXTREME])
@pytest.mark.parametrize("first_block", [0, 5, 2**40])
def test_torch_words_have_the_bits_of_numpys(direction: DirectionId, first_block: int) -> None:
    got = torch_words(direction, first_block, 9, torch.device("cpu"))
    want = DirectionGenerator().words(direction, first_block, 9)
    assert got.numpy().astype("<i8").tobytes() == want.astype("<u8").tobytes()


def assert_torch_adds_alike(
    direction: DirectionId, size: int, device: str, scale: float = 0.0123
) -> None:
    base = vector(size)
    want = np.empty_like(base)
    DirectionGenerator().add_scaled(direction, scale, base, want)
    tensor = torch.from_numpy(base.copy()).to(device)
    out = torch.empty_like(tensor)
    torch_add_scaled(direction, scale, tensor, out)
    torch_add_scaled(direction, scale, tensor, tensor)
    assert out.cpu().numpy().tobytes() == want.tobytes()
    assert tensor.cpu().numpy().tobytes() == want.tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direction", [ORIGIN, *EXTREME])
def test_torch_adds_the_same_bits(direction: DirectionId, size: int) -> None:
    assert_torch_adds_alike(direction, size, "cpu")


def test_torch_adds_the_same_bits_of_a_subnormal_scale() -> None:
    assert_torch_adds_alike(EXTREME[0], 300, "cpu", scale=-1e-41)


def test_torch_adds_the_same_bits_across_its_chunks() -> None:
    """torch works in pieces of 4 Mi signs."""
    assert_torch_adds_alike(EXTREME[0], (4 << 20) + 257, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("size", [1, 65537, (4 << 20) + 257])
@pytest.mark.parametrize("direction", [ORIGIN, *EXTREME])
def test_a_gpu_adds_the_same_bits(direction: DirectionId, size: int) -> None:
    assert_torch_adds_alike(direction, size, "cuda")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_seed", 1 << 64),
        *((name, 1 << 32) for name in ("half", "device", "round", "step", "k")),
        *((name, -1) for name in DirectionId._fields),
    ],
)
def test_a_field_that_does_not_fit_is_refused(field: str, value: int) -> None:
    """Otherwise two directions could share their bits."""
    direction = ORIGIN._replace(**{field: value})
    with pytest.raises(ValueError, match=r"2\*\*64"):
        DirectionGenerator().signs(direction, 0, 1)
    with pytest.raises(ValueError, match=r"2\*\*64"):
        torch_words(direction, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("batch", "samples"), [(1, 1), (4, 12), (5, 12), (12, 12), (30, 12)])
def test_batches_visit_each_sample_once_an_epoch(batch: int, samples: int) -> None:
    """Also when a batch spans epochs, or holds several."""
    rounds = samples * 3
    drawn = np.concatenate([batch_indices(9, 2, r, batch, samples) for r in range(rounds)])
    assert drawn.size == batch * rounds
    epochs = drawn.reshape(-1, samples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [range(samples)] * len(epochs))


def test_batches_are_a_pure_function_of_seed_device_and_round() -> None:
    a = batch_indices(1, 2, 5, 8, 100).tolist()
    np.random.default_rng(0).random(3)
    assert batch_indices(1, 2, 5, 8, 100).tolist() == a
    others = [(2, 2, 5), (1, 3, 5), (1, 2, 6)]
    assert all(batch_indices(*other, 8, 100).tolist() != a for other in others)


def test_an_empty_shard_has_no_batches() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        batch_indices(1, 2, 5, 8, 0)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 1000])
def test_a_permutation_holds_every_index_once(length: int) -> None:
    draw = ORIGIN._replace(half=Stream.BATCH)
    assert sorted(permutation(draw, length)) == list(range(length))


def test_participants_are_a_sorted_subset_whatever_the_order_of_the_list() -> None:
    devices = [3, 1, 4, 15, 9, 2]
    rounds = [participants(7, r, devices, 3) for r in range(40)]
    for number, chosen in enumerate(rounds):
        assert chosen == sorted(set(chosen))
        assert len(chosen) == 3
        assert set(chosen) <= set(devices)
        assert chosen == participants(7, number, sorted(devices), 3)
    assert set(itertools.chain(*rounds)) == set(devices)


def test_the_digest_of_seed_0_is_fixed_and_that_of_seed_1_is_another() -> None:
    assert (
        directions_digest(0) == "7e3924b4a050a06bbfdc3dc34b7353841c0517712e33fbae9632bdf8879e9e9b"
    )
    assert directions_digest(1) != directions_digest(0)
