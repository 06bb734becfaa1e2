"""Low-rank adapters on linear and convolutional layers: y = W x + b + B (A x).

LoRA (Hu et al., arXiv 2106.09685) with A fixed at random, as in LoRA-FA (arXiv 2308.03303): B
starts at zero, so the model starts as it was, and B alone is trained: R numbers per output. Were A
trained too, half of a perturbation would at first move nothing, as B = 0.
"""

from __future__ import annotations

import math
from typing import Final, cast

import torch
from torch import nn
from torch.nn import functional

FIXED: Final = "adapter_a"
ADAPTER: Final = "adapter_b"


class AdaptedLinear(nn.Linear):
    """A linear layer with A (R, inputs) and B (outputs, R)."""

    adapter_a: torch.Tensor
    adapter_b: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102 - as nn.Linear's
        low = functional.linear(x, self.adapter_a)
        return super().forward(x) + functional.linear(low, self.adapter_b)


class AdaptedConv2d(nn.Conv2d):
    """A convolution with A (R, channels, *kernel) and B (outputs, R, 1, 1)."""

    adapter_a: torch.Tensor
    adapter_b: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102 - as nn.Conv2d's
        low = self._conv_forward(x, self.adapter_a, None)
        return super().forward(x) + functional.conv2d(low, self.adapter_b)


def add_adapters(module: nn.Module, parameters: set[str], rank: int, seed: int) -> int:
    """Adapt, in place, the plain layers whose weight is in `parameters`; returns how many.

    Subclasses with a forward of their own and grouped convolutions are left alone.
    """
    random = torch.Generator().manual_seed(seed)
    adapted = 0
    for name, layer in list(module.named_modules()):
        if f"{name}.weight".lstrip(".") not in parameters or not _fits(layer):
            continue
        weight = cast("torch.Tensor", layer.weight)
        shape = (rank, *weight.shape[1:])
        fixed = torch.randn(shape, generator=random) / math.sqrt(math.prod(shape[1:]))
        layer.register_buffer(FIXED, fixed)
        ones = (1,) * (weight.ndim - 2)
        layer.register_parameter(ADAPTER, nn.Parameter(torch.zeros(len(weight), rank, *ones)))
        layer.__class__ = AdaptedLinear if weight.ndim == 2 else AdaptedConv2d
        adapted += 1
    return adapted


def merge_adapters(own: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> None:
    """Add B A to the weights `own`, in place; `trained` holds both by the model's names."""
    for name, second in trained.items():
        layer, dot, last = name.rpartition(".")
        if last == ADAPTER:
            first = trained[f"{layer}{dot}{FIXED}"]
            weight = own[f"{layer}{dot}weight"]
            weight += (second.flatten(1) @ first.flatten(1)).reshape(weight.shape)


def _fits(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1
    return type(layer) is nn.Linear
