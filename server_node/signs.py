"""What the server half needs of directions, and the CPU's way to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from wire_protocol.directions import DirectionGenerator, DirectionId


class Signs(Protocol):
    """Packed sign vectors of several directions: drawn once, added several times.

    What `draw` returns is for `add` of the same object only.
    """

    def draw(self, directions: Sequence[DirectionId], count: int) -> Any:
        """Signs 0..count of each direction."""
        ...

    def add(
        self, packed: Any, scales: Sequence[float], base: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Out = base + scale * u, row by row, (rows, d) float32; out may be base."""
        ...


class NumpySigns:
    """Signs of wire_protocol.directions on tensors in host memory."""

    def __init__(self) -> None:
        self._generator = DirectionGenerator()

    def draw(self, directions: Sequence[DirectionId], count: int) -> list[NDArray[np.uint8]]:
        """See Signs."""
        return [self._generator.signs_packed(direction, count) for direction in directions]

    def add(
        self, packed: list[NDArray[np.uint8]], scales: Sequence[float], base: torch.Tensor,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """See Signs."""
        rows = zip(packed, scales, base.numpy(), out.numpy(), strict=True)
        for octets, scale, from_row, to_row in rows:
            self._generator.add_packed(octets, scale, from_row, to_row)
