"""The server half: tau unbalanced zeroth-order steps, loss differences, evaluation.

Memory is constant in the number of devices: a base, one working copy and one scratch vector. A
device's copy x_s^m is a function of the base and its journaled scalars, so it is rebuilt when the
server comes back to that device (MU-SplitFed keeps M replicas instead; arXiv 2510.21155, alg. 1).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from server_node.torch_directions import torch_add_scaled
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream
from wire_protocol.estimator import step_scale

# Loss differences are measured in batches of at most this many activations.
_MEASURE_ROWS: Final = 4096
_EVALUATE_ROWS: Final = 1024

Vector = NDArray[np.float32]
AddScaled = Callable[[DirectionId, float, torch.Tensor, torch.Tensor], None]


class ActivationBatch(NamedTuple):
    """A device's activation h (batch, *activation shape) and labels (batch,), on the device."""

    h: torch.Tensor
    labels: torch.Tensor


class Scores(NamedTuple):
    """Mean cross-entropy and share of right answers on the test set."""

    loss: float
    accuracy: float


class ServerHalf:
    """Weights and arithmetic of the server half on one torch device."""

    def __init__(
        self, module: nn.Module, weights: Vector, *, run_seed: int, lam: float,
        directions: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._run_seed = run_seed
        self._lam = lam
        self._directions = directions
        self._device = device
        self._module = module.to(device).eval()
        self._add_scaled = torch_add_scaled if device.type == "cuda" else _numpy_add_scaled()
        # torch.empty aligns to 64 bytes: kernels, and so bits, do not depend on the allocation.
        self._base = torch.empty(len(weights), device=device)
        self._working = torch.empty_like(self._base)
        self._scratch = torch.empty_like(self._base)
        self._eta = 0.0
        self._round = -1
        self._copy_of: tuple[int, int] | None = None  # device and steps that `_working` holds
        _bind(self._module, self._scratch)
        self.load(weights)

    def load(self, weights: Vector) -> None:
        """Take over the base weights (d_s,)."""
        self._base.copy_(torch.from_numpy(weights))
        self._copy_of = None

    def start_round(self, number: int, eta: float) -> None:
        """Steps from here on belong to this round and have this size."""
        self._round, self._eta, self._copy_of = number, eta, None

    def place(self, h: Vector, labels: NDArray[np.uint32]) -> ActivationBatch:
        """Copy what a frame brought into aligned memory of this device."""
        return ActivationBatch(self._tensor(h), self._labels(labels))

    @torch.inference_mode()
    def step(self, device: int, batch: ActivationBatch, done: list[list[float]]) -> list[float]:
        """The next step of `device` after the steps `done`; returns its K_s scalars.

        scalars[k] = L(x + lam u_k; h) - L(x - lam u_k; h), then x -= eta mean_k(...) u_k.
        """
        self._become(device, done)
        origin = self._direction(device, len(done))
        scalars: list[float] = []
        for k in range(self._directions):
            direction = origin._replace(k=k)
            self._add_scaled(direction, self._lam, self._working, self._scratch)
            plus = self._loss(batch)
            self._add_scaled(direction, -self._lam, self._working, self._scratch)
            scalars.append(_float32(plus - self._loss(batch)))
        self._apply(device, len(done), scalars)
        self._copy_of = (device, len(done) + 1)
        return scalars

    @torch.inference_mode()
    def measure(
        self, device: int, batch: ActivationBatch, differences: Vector, done: list[list[float]]
    ) -> list[float]:
        """L(x_s^tau; h + d/2) - L(x_s^tau; h - d/2) for each d of `differences` (K, *h.shape)."""
        self._become(device, done)
        self._scratch.copy_(self._working)
        rows = len(batch.labels)
        group = max(1, _MEASURE_ROWS // (2 * rows))
        scalars: list[float] = []
        for first in range(0, len(differences), group):
            half = self._tensor(differences[first : first + group]) * 0.5
            sides = torch.stack((batch.h + half, batch.h - half), dim=1).flatten(0, 2)
            losses = self._losses(sides, batch.labels.repeat(2 * len(half)))
            means = losses.double().reshape(len(half), 2, rows).mean(dim=2)
            scalars += [_float32(value) for value in (means[:, 0] - means[:, 1]).tolist()]
        return scalars

    @torch.inference_mode()
    def evaluate(self, h: Vector, labels: NDArray[np.int64]) -> Scores:
        """Scores of the base weights on activations h (n, *activation shape)."""
        self._scratch.copy_(self._base)
        loss = right = 0.0
        for first in range(0, len(labels), _EVALUATE_ROWS):
            part = labels[first : first + _EVALUATE_ROWS]
            truth = self._labels(part)
            logits = self._module(self._tensor(h[first : first + _EVALUATE_ROWS]))
            losses = functional.cross_entropy(logits, truth, reduction="none")
            loss += float(losses.double().sum())
            right += int((logits.argmax(1) == truth).sum())
        return Scores(loss / len(labels), right / len(labels))

    def _become(self, device: int, done: list[list[float]]) -> None:
        """Make `_working` the copy of `device` after the steps `done`."""
        if self._copy_of == (device, len(done)):
            return
        self._working.copy_(self._base)
        for step, scalars in enumerate(done):
            self._apply(device, step, scalars)
        self._copy_of = (device, len(done))

    def _apply(self, device: int, step: int, scalars: list[float]) -> None:
        scale = step_scale(self._eta, self._lam, self._directions)
        origin = self._direction(device, step)
        for k, delta in enumerate(scalars):
            self._add_scaled(origin._replace(k=k), -scale * delta, self._working, self._working)

    def _direction(self, device: int, step: int) -> DirectionId:
        return DirectionId(self._run_seed, Stream.SERVER_HALF, device, self._round, step, 0)

    def _loss(self, batch: ActivationBatch) -> float:
        return float(self._losses(batch.h, batch.labels).double().mean())

    def _losses(self, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self._module(h), labels, reduction="none")

    def _tensor(self, array: Vector) -> torch.Tensor:
        # A frame's body may be unaligned; a fresh tensor never is.
        tensor = torch.empty(array.shape, dtype=torch.float32)
        tensor.numpy()[...] = array
        return tensor.to(self._device)

    def _labels(self, labels: NDArray[np.uint32] | NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(labels.astype(np.int64)).to(self._device)


def _bind(module: nn.Module, flat: torch.Tensor) -> None:
    """Make the module's parameters views of `flat`, in order."""
    offset = 0
    for parameter in module.parameters():
        size = parameter.numel()
        parameter.data = flat[offset : offset + size].view(parameter.shape)
        parameter.requires_grad_(False)
        offset += size


def _numpy_add_scaled() -> AddScaled:
    generator = DirectionGenerator()

    def add_scaled(
        direction: DirectionId, scale: float, base: torch.Tensor, out: torch.Tensor
    ) -> None:
        generator.add_scaled(direction, scale, base.numpy(), out.numpy())

    return add_scaled


def _float32(value: float) -> float:
    """The nearest float32, or infinity: what the journal and the wire carry."""
    return ctypes.c_float(value).value
