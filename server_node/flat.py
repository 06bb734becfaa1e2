"""Flat weight vectors and the parameters of a module: the same order everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def parameter_views(
    module: nn.Module, flat: torch.Tensor
) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Name and parameter in the module's order, and its part of `flat` (d,) in its shape."""
    offset = 0
    for name, parameter in module.named_parameters():
        part = flat[offset : offset + parameter.numel()]
        yield name, parameter, part.view(parameter.shape)
        offset += parameter.numel()


def bind(module: nn.Module, flat: torch.Tensor) -> None:
    """Make the module's parameters views of `flat` (d,): what is written there is computed with."""
    for _, parameter, view in parameter_views(module, flat):
        parameter.data = view
        parameter.requires_grad_(False)


def aligned_rows(rows: int, size: int, device: torch.device) -> torch.Tensor:
    """Zeros (rows, size), each row on a 64-byte boundary.

    Kernels, and so bits, depend on alignment; they must not depend on the row.
    """
    stride = -(-size // 16) * 16
    return torch.zeros(rows, stride, device=device)[:, :size]
