"""Directions on a GPU: the same Philox4x64-10 integers as wire_protocol.directions, in torch int64.

torch has no unsigned 64-bit arithmetic: int64 wraps as uint64 does, and the high half of a
64 x 64 product is put together from 32-bit limbs. Constants: Random123, philox.h.
"""

from __future__ import annotations

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
# 4 Mi signs a chunk: enough to fill a GPU, 16 MiB of float32 scratch.
_CHUNK_BLOCKS: Final = 1 << 14


def torch_words(
    direction: DirectionId, first_block: int, blocks: int, device: torch.device
) -> torch.Tensor:
    """Raw words (blocks, 4) int64 whose bits are those of DirectionGenerator.words."""
    direction.check()
    c0 = torch.arange(first_block + 1, first_block + 1 + blocks, dtype=torch.int64, device=device)
    c1 = torch.full_like(c0, _signed(direction.round << 32 | direction.step))
    c2 = torch.full_like(c0, direction.k)
    c3 = torch.zeros_like(c0)
    k0, k1 = direction.run_seed, direction.half << 32 | direction.device
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def torch_add_scaled(
    direction: DirectionId, scale: float, base: torch.Tensor, out: torch.Tensor
) -> None:
    """Out = base + scale * u, (d,) float32 on any device: the bits of DirectionGenerator."""
    scale32 = torch.tensor(scale, dtype=torch.float32, device=base.device)
    shifts = torch.arange(64, dtype=torch.int64, device=base.device)
    total = base.shape[0]
    for first in range(0, -(-total // SIGNS_PER_BLOCK), _CHUNK_BLOCKS):
        begin = first * SIGNS_PER_BLOCK
        end = min(total, begin + _CHUNK_BLOCKS * SIGNS_PER_BLOCK)
        blocks = -(-(end - begin) // SIGNS_PER_BLOCK)
        words = torch_words(direction, first, blocks, base.device).reshape(-1, 1)
        negative = ((words >> shifts) & 1).reshape(-1)[: end - begin].bool()
        torch.add(base[begin:end], torch.where(negative, -scale32, scale32), out=out[begin:end])


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
