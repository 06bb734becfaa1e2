"""Directions on a GPU: the same Philox4x64-10 integers as wire_protocol.directions, in torch int64.

torch has no unsigned 64-bit arithmetic: int64 wraps as uint64 does, and the high half of a
64 x 64 product is put together from 32-bit limbs. Constants: Random123, philox.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from wire_protocol.directions import SIGNS_PER_BLOCK, DirectionId

_M0: Final = 0xD2E7470EE14C6C93
_M1: Final = 0xCA5A826395121157
_W0: Final = 0x9E3779B97F4A7C15
_W1: Final = 0xBB67AE8584CAA73B
_ROUNDS: Final = 10
_LOW: Final = 0xFFFFFFFF
_MASK: Final = 0xFFFFFFFFFFFFFFFF
# 4 Mi signs a chunk: enough to fill a GPU; 16 MiB of signs as float32, 2 MiB of indices.
_CHUNK_OCTETS: Final = 1 << 19


def torch_words(
    directions: Sequence[DirectionId], first_block: int, blocks: int, device: torch.device
) -> torch.Tensor:
    """Raw words (directions, blocks, 4) int64 whose bits are those of DirectionGenerator.words."""
    for direction in directions:
        direction.check()

    def column(values: list[int]) -> torch.Tensor:
        signed = [_signed(value) for value in values]
        return torch.tensor(signed, dtype=torch.int64, device=device)[:, None]

    k0 = column([d.run_seed for d in directions])
    k1 = column([d.half << 32 | d.device for d in directions])
    c0 = torch.arange(first_block + 1, first_block + 1 + blocks, dtype=torch.int64, device=device)
    c0 = c0.expand(len(directions), blocks)
    c1 = column([d.round << 32 | d.step for d in directions]).expand_as(c0)
    c2 = column([d.k for d in directions]).expand_as(c0)
    c3 = torch.zeros_like(c0)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _signed(_W0), k1 + _signed(_W1)
    return torch.stack((c0, c1, c2, c3), dim=2)


class TorchSigns:
    """Sign vectors of several directions at once, on any torch device; a signs.Signs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Row b: the eight signs of octet b, LSB first; a set bit is -1.
        bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
        self._signs = (1 - 2 * bits).float()

    def draw(self, directions: Sequence[DirectionId], count: int) -> torch.Tensor:
        """Signs 0..count of each direction, packed: (directions, ceil(count / 8)) octets."""
        words = torch_words(directions, 0, -(-count // SIGNS_PER_BLOCK), self._device)
        return words.view(len(directions), -1).view(torch.uint8)[:, : -(-count // 8)]

    def add(
        self, packed: torch.Tensor, scales: Sequence[float], base: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Out = base + scale * u, row by row, (rows, d) float32: the bits of DirectionGenerator."""
        scale = torch.tensor(scales, dtype=torch.float32, device=self._device)[:, None]
        rows, total = base.shape
        step = max(1, _CHUNK_OCTETS // rows)
        for first in range(0, packed.shape[1], step):
            octets = packed[:, first : first + step]
            begin, end = 8 * first, min(total, 8 * (first + octets.shape[1]))
            signs = self._signs.index_select(0, octets.reshape(-1).int()).view(rows, -1)
            # scale * sign is exact, so there is one rounding, fused or not.
            torch.addcmul(base[:, begin:end], signs[:, : end - begin], scale, out=out[:, begin:end])


def _signed(value: int) -> int:
    """The int64 that has the bits of a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _multiply(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 64 bits of constant * x, as unsigned numbers."""
    a_low, a_high = constant & _LOW, constant >> 32
    b_low, b_high = x & _LOW, (x >> 32) & _LOW
    low_low = a_low * b_low
    high_low = a_high * b_low
    low_high = a_low * b_high
    carry = (_shift(low_low) + (high_low & _LOW) + (low_high & _LOW)) >> 32
    high = a_high * b_high + _shift(high_low) + _shift(low_high) + carry
    return high, x * _signed(constant)


def _shift(x: torch.Tensor) -> torch.Tensor:
    """Logical shift right by 32."""
    return (x >> 32) & _LOW
