"""What both orders of the server half share: a module on a torch device, frames placed beside it.

The module's parameters are views of one flat vector that the subclass owns and writes to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

# Loss differences are measured in batches of at most this many activations.
_MEASURE_ROWS: Final = 4096
_EVALUATE_ROWS: Final = 256

Vector = NDArray[np.float32]


class ActivationBatch(NamedTuple):
    """A device's activation h (batch, *activation shape) and labels (batch,), on the device."""

    h: torch.Tensor
    labels: torch.Tensor


class Turn(NamedTuple):
    """A device's next step: where in the batch it is computed, and the scalars of those before."""

    slot: int
    device: int
    batch: ActivationBatch
    done: list[list[float]]


class Scores(NamedTuple):
    """Mean cross-entropy and share of right answers on the test set."""

    loss: float
    accuracy: float


class TorchHalf:
    """A module in evaluation mode; the weights it computes with are the subclass's business."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._module = module.to(device).eval()

    def place(self, h: Vector, labels: NDArray[np.uint32]) -> ActivationBatch:
        """Copy what a frame brought into aligned memory of this device."""
        return ActivationBatch(self._tensor(h), self._labels(labels))

    def _loss_differences(self, batch: ActivationBatch, differences: Vector) -> list[float]:
        """L(h + d/2) - L(h - d/2), batch means, for each d of `differences` (K, *h.shape)."""
        rows = len(batch.labels)
        group = max(1, _MEASURE_ROWS // (2 * rows))
        scalars: list[float] = []
        for first in range(0, len(differences), group):
            half = self._tensor(differences[first : first + group]) * 0.5
            sides = torch.stack((batch.h + half, batch.h - half), dim=1).flatten(0, 2)
            losses = self._losses(sides, batch.labels.repeat(2 * len(half)))
            means = losses.double().reshape(len(half), 2, rows).mean(dim=2)
            scalars += [as_float32(value) for value in (means[:, 0] - means[:, 1]).tolist()]
        return scalars

    def _gradient(self, batch: ActivationBatch) -> Vector:
        """dL/dh (batch, *activation shape), L the mean loss over the batch."""
        with torch.enable_grad():
            h = batch.h.detach().clone().requires_grad_()
            loss = functional.cross_entropy(self._module(own_copy(h)), batch.labels)
            (gradient,) = torch.autograd.grad(loss, h)
        found: Vector = gradient.cpu().numpy()
        return found

    def _scores(self, h: Vector, labels: NDArray[np.int64]) -> Scores:
        """Scores on activations h (n, *activation shape)."""
        loss = right = 0.0
        for first in range(0, len(labels), _EVALUATE_ROWS):
            part = labels[first : first + _EVALUATE_ROWS]
            truth = self._labels(part)
            logits = self._module(self._tensor(h[first : first + _EVALUATE_ROWS]))
            losses = functional.cross_entropy(logits, truth, reduction="none")
            loss += float(losses.double().sum())
            right += int((logits.argmax(1) == truth).sum())
        return Scores(loss / len(labels), right / len(labels))

    def _pooled_loss(self, batches: Sequence[ActivationBatch]) -> float:
        """Mean loss of the module on the activations of several devices, all of one size."""
        total, rows = 0.0, 0
        group = max(1, _MEASURE_ROWS // max(1, len(batches[0].labels)))
        for first in range(0, len(batches), group):
            part = batches[first : first + group]
            h = torch.cat([batch.h for batch in part])
            losses = self._losses(h, torch.cat([batch.labels for batch in part]))
            total += float(losses.double().sum())
            rows += len(losses)
        return total / rows

    def _losses(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self._module(h), labels, reduction="none")

    def _tensor(self, array: Vector) -> torch.Tensor:
        # A frame's body may be unaligned; a fresh tensor never is.
        tensor = torch.empty(array.shape, dtype=torch.float32)
        tensor.numpy()[...] = array
        return tensor.to(self._device)

    def _labels(self, labels: NDArray[np.uint32] | NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(labels.astype(np.int64)).to(self._device)


def own_copy(h: torch.Tensor) -> torch.Tensor:
    """A copy of activations for a module whose first layer may work in place.

    Images lie channels last: torch's convolutions take a tenth to a sixth less time with them.
    """
    images = h.dim() == 4
    return h.clone(memory_format=torch.channels_last if images else torch.contiguous_format)


def as_float32(value: float) -> float:
    """The nearest float32, or infinity: what the journal and the wire carry."""
    return ctypes.c_float(value).value
