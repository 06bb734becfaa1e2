"""Initial weights for networks that have no normalisation: no data are needed.

The first convolution whitens the patches of natural images, whose covariance is assumed: pixels
correlate as exp(-distance / 4), colours at 0.9. Its kernels are the principal components, divided
by their deviations, each with both signs (a ReLU behind it keeps half). All other layers are
orthogonal maps (Saxe et al. 2014; convolutions at their centre, Xiao et al. 2018), which
keep the size of a signal through any number of layers.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

# Pixels at which the assumed correlation is 1 / e, and the correlation of a pixel's colours.
_CORRELATION_PIXELS: Final = 4.0
_CORRELATION_COLOURS: Final = 0.9
# Added to a component's variance.
_FLOOR: Final = 1e-2
# Deviation of the weights of filters beyond the components.
_REST: Final = 0.2
# What a ReLU and the pooling before it leave of a convolution's signal is made up for.
_GAIN: Final = math.sqrt(2.0)


def assumed_covariance(channels: int, size: int) -> NDArray[np.float64]:
    """Of patches (channels, size, size), flat, of standardised images."""
    grid = np.indices((size, size)).reshape(2, -1).T
    apart = np.linalg.norm(grid[:, None] - grid[None], axis=2)
    colours = np.full((channels, channels), _CORRELATION_COLOURS)
    np.fill_diagonal(colours, 1.0)
    covariance: NDArray[np.float64] = np.kron(colours, np.exp(-apart / _CORRELATION_PIXELS))
    return covariance


@torch.no_grad()
def start_white(module: nn.Module) -> nn.Module:
    """Give a network of convolutions and linear layers these weights; the biases are zero.

    Draws from torch's generator.
    """
    first = True
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if layer.bias is not None:
            layer.bias.zero_()
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
        elif first:
            _whiten(layer)
        else:
            _centre(layer)
        first = False
    return module


def _whiten(layer: nn.Conv2d) -> None:
    """Kernels of whitening components, strongest first, each with both signs."""
    weight = layer.weight
    filters, channels, size, _ = weight.shape
    values, vectors = np.linalg.eigh(assumed_covariance(channels, size))
    values, vectors = values[::-1], vectors[:, ::-1]
    # eigh leaves the signs open; both are used.
    count = min((filters + 1) // 2, len(values))
    kernels = (vectors[:, :count] / np.sqrt(values[:count] + _FLOOR)).T
    both = torch.from_numpy(np.concatenate([kernels, -kernels])).float()[:filters]
    nn.init.normal_(weight, std=_REST)
    weight[: len(both)] = both.reshape(-1, channels, size, size)


def _centre(layer: nn.Conv2d) -> None:
    """An orthogonal map of the channels at the kernel's centre, zero around it."""
    weight = layer.weight
    orthogonal = torch.empty(weight.shape[:2])
    nn.init.orthogonal_(orthogonal, gain=_GAIN)
    weight.zero_()
    weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = orthogonal
