"""Seeded +-1 directions and seeded integers, as pure functions of their coordinates.

A direction is the sign pattern u of a zeroth-order perturbation. Nobody sends it: both sides
compute it from (run seed, half, device index, round, server step, k). Rademacher signs lie
exactly on the sphere of radius sqrt(d), and theta + (+-s) is one IEEE rounding, so replaying
a run gives the same bits on every machine.

Generator: Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
counter-based, hence random access. Packing, injective because no two fields share a bit::

    key     = [run_seed, stream << 32 | device]
    counter = [block + 1, round << 32 | step, k, 0]

A block is four 64-bit words = 256 signs; words are read as little-endian bytes, bits LSB first,
a set bit means -1. The "+ 1" is numpy's: its Philox increments the counter before each block.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from enum import IntEnum
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIGNS_PER_BLOCK: Final = 256
_WORDS_PER_BLOCK: Final = 4
# 64 Ki signs: the 256 KiB float32 scratch stays in a board's L2 cache.
_CHUNK_SIGNS: Final = 256 * SIGNS_PER_BLOCK


class Stream(IntEnum):
    """What the integers are for; the first two are the halves of the model."""

    CLIENT_HALF = 0
    SERVER_HALF = 1
    BATCH = 2
    PARTICIPATION = 3


class DirectionId(NamedTuple):
    """Coordinates of one direction. All fields are non-negative; seed < 2**64, others < 2**32."""

    run_seed: int
    half: Stream
    device: int
    round: int
    step: int
    k: int

    def check(self) -> None:
        """Raise ValueError when a field does not fit its place in the packing."""
        run_seed, half, device, number, step, k = self
        # A negative integer stays negative however far it is shifted.
        if run_seed >> 64 or (half | device | number | step | k) >> 32:
            raise ValueError(f"{self}: run_seed must be in 0..2**64-1, the others in 0..2**32-1")


class DirectionGenerator:
    """Generates directions; holds one generator object and one chunk of scratch, no state."""

    def __init__(self) -> None:
        # The seed given here is never used: every call sets key and counter.
        self._philox = np.random.Philox(key=0)
        self._state: Any = dict(self._philox.state)
        self._state["buffer"] = (0, 0, 0, 0)
        self._state["buffer_pos"] = _WORDS_PER_BLOCK  # nothing is left over from another call
        # Tuples: numpy takes their integers out twice as fast as an array's.
        self._place: dict[str, tuple[int, ...]] = {"key": (0, 0), "counter": (0, 0, 0, 0)}
        self._state["state"] = self._place
        # Row b: the eight signs of byte b, LSB first; a set bit is -1.
        bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
        self._signs = (1 - 2 * bits).astype(np.float32)
        self._table = self._signs.copy()  # the rows times `_scale`
        self._scale = 1.0
        self._scratch = np.empty((_CHUNK_SIGNS // 8, 8), np.float32)
        self._flat = self._scratch.reshape(-1)
        self._unpacked: NDArray[np.uint8] | None = None  # what `_scratch` holds, times `_scale`

    def words(self, direction: DirectionId, first_block: int, blocks: int) -> NDArray[np.uint64]:
        """Raw Philox words (blocks * 4,) of a direction, from `first_block` on."""
        direction.check()
        run_seed, half, device, number, step, k = direction
        self._place["key"] = run_seed, half << 32 | device
        self._place["counter"] = first_block, number << 32 | step, k, 0
        self._philox.state = self._state
        return self._philox.random_raw(blocks * _WORDS_PER_BLOCK)

    def signs(self, direction: DirectionId, start: int, stop: int) -> NDArray[np.float32]:
        """Elements start..stop of the direction, float32 +-1, shape (stop - start,)."""
        if not 0 <= start <= stop:
            raise ValueError(f"slice {start}:{stop} is not a forward slice")
        first = start // SIGNS_PER_BLOCK
        blocks = -(-stop // SIGNS_PER_BLOCK) - first
        octets = _octets(self.words(direction, first, blocks))
        skip = start - first * SIGNS_PER_BLOCK
        return self._signs[octets].reshape(-1)[skip : skip + stop - start].copy()

    def signs_packed(self, direction: DirectionId, count: int) -> NDArray[np.uint8]:
        """Signs 0..count of the direction as (ceil(count / 8),) octets, LSB first, set bit -1.

        A 32nd of the direction in float32: made once, it serves several `add_packed`. Read-only.
        """
        words = self.words(direction, 0, -(-count // SIGNS_PER_BLOCK))
        octets = _octets(words)[: -(-count // 8)]
        octets.setflags(write=False)
        return octets

    def add_packed(
        self,
        octets: NDArray[np.uint8],
        scale: float,
        base: NDArray[np.float32],
        out: NDArray[np.float32],
    ) -> None:
        """Out = base + scale * u, u packed by `signs_packed`; bits and rules of `add_scaled`."""
        if scale not in (self._scale, -self._scale):
            self._prepare(scale)
        if base.shape[0] > _CHUNK_SIGNS:
            for begin in range(0, base.shape[0], _CHUNK_SIGNS):
                end = begin + _CHUNK_SIGNS
                self._unpack(octets[begin // 8 : end // 8])
                self._add(scale, base[begin:end], out[begin:end])
            return
        if octets is not self._unpacked:  # theta - lam u comes right after theta + lam u
            self._unpack(octets)
            self._unpacked = octets
        self._add(scale, base, out)

    def add_scaled(
        self,
        direction: DirectionId,
        scale: float,
        base: NDArray[np.float32],
        out: NDArray[np.float32],
    ) -> None:
        """Out = base + scale * u, all (d,) float32; one rounding an element; out may be base."""
        self._prepare(scale)
        total = base.shape[0]
        for begin in range(0, total, _CHUNK_SIGNS):
            end = min(total, begin + _CHUNK_SIGNS)
            blocks = -(-(end - begin) // SIGNS_PER_BLOCK)
            octets = _octets(self.words(direction, begin // SIGNS_PER_BLOCK, blocks))
            self._unpack(octets[: -(-(end - begin) // 8)])
            self._add(scale, base[begin:end], out[begin:end])

    def _prepare(self, scale: float) -> None:
        """Make the table serve +scale and -scale."""
        self._scale, self._unpacked = abs(scale), None
        np.multiply(self._signs, np.float32(self._scale), out=self._table)

    def _unpack(self, octets: NDArray[np.uint8]) -> None:
        """Fill the scratch with one chunk at most of +-`_scale`."""
        self._unpacked = None
        # mode="clip" spares numpy a buffered copy; octets are in range by type.
        self._table.take(octets, 0, self._scratch[: octets.shape[0]], "clip")

    def _add(self, scale: float, base: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Add the scratch; a - b has the bits of a + (-b), zeros included."""
        add = np.subtract if math.copysign(1.0, scale) < 0 else np.add
        add(base, self._flat[: base.shape[0]], out)


def _octets(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return (words.byteswap() if sys.byteorder == "big" else words).view(np.uint8)


def batch_indices(
    run_seed: int, device: int, round_number: int, batch: int, samples: int
) -> NDArray[np.int64]:
    """Indices (batch,) that a device draws in a round: consecutive pieces of seeded permutations.

    Every sample is seen once before any is seen again; a batch may span two permutations.
    """
    if samples < 1:
        raise ValueError("a shard needs at least one sample")
    positions = np.arange(round_number * batch, (round_number + 1) * batch)
    chosen = np.empty(batch, np.int64)
    for epoch in np.unique(positions // samples):
        here = positions // samples == epoch
        order = permutation(DirectionId(run_seed, Stream.BATCH, device, int(epoch), 0, 0), samples)
        chosen[here] = order[positions[here] % samples]
    return chosen


def participants(run_seed: int, round_number: int, devices: list[int], count: int) -> list[int]:
    """The `count` devices (ascending) that take part in a round, drawn from `devices`."""
    ordered = sorted(devices)
    draw = DirectionId(run_seed, Stream.PARTICIPATION, 0, round_number, 0, 0)
    order = permutation(draw, len(ordered))
    return sorted(ordered[i] for i in order[:count])


def permutation(draw: DirectionId, length: int) -> NDArray[np.int64]:
    """A permutation (length,) that is a pure function of its coordinates."""
    draw.check()
    run_seed, half, device, number, step, k = draw
    # As DirectionGenerator.words from block 0 on, without its tables.
    key = np.array([run_seed, half << 32 | device], np.uint64)
    counter = np.array([0, number << 32 | step, k, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(length)
    return np.argsort(words, kind="stable")


@functools.lru_cache(maxsize=4)
def directions_digest(run_seed: int) -> str:
    """SHA-256 over sample directions that differ in each field: compared in the handshake."""
    generator = DirectionGenerator()
    origin = DirectionId(run_seed, Stream.CLIENT_HALF, 0, 0, 0, 0)
    others = [
        origin._replace(half=Stream.SERVER_HALF),
        origin._replace(device=1),
        origin._replace(round=1),
        origin._replace(step=1),
        origin._replace(k=1),
    ]
    digest = hashlib.sha256()
    for direction in (origin, *others):
        digest.update(_octets(generator.words(direction, 0, 2)).tobytes())
        digest.update(_octets(generator.words(direction, 1 << 40, 1)).tobytes())
    digest.update(batch_indices(run_seed, 0, 1, 5, 7).astype("<i8").tobytes())
    return digest.hexdigest()
