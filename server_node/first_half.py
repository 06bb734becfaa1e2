"""The server half in first order: autograd and an optimiser of torch.optim.

Every copy starts at the base x_s^t and at the base's optimiser state, and makes its tau steps in
one go, since nothing short of its frames could rebuild it. What becomes of the copies, weights and
optimiser state, is averaged; eta_g applies to the weights. Memory is constant in the number of
devices: base, one working copy, their optimiser states, a gradient, and the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from server_node.flat import aligned_rows, bind
from server_node.guards import Guards
from server_node.optimisers import OptimiserRule, OptimiserState, build_optimiser
from server_node.torch_half import (
    ActivationBatch,
    Scores,
    TorchHalf,
    Turn,
    as_float32,
    own_copy,
)

# Vectors in float64 are made of so many elements at a time, which stay in the processor's cache.
_CHUNK: Final = 1 << 16

Vector = NDArray[np.float32]


class ExactSum:
    """Sum of float32 vectors (n,) whose bits do not depend on the order of the addends.

    Two float64 a value (Knuth's TwoSum): no bit is lost while the largest addend of an element is
    below 2^80 times its smallest.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._high, self._low = torch.zeros(2, size, dtype=torch.float64, device=device)
        self.count = 0

    def clear(self) -> None:
        """Begin anew."""
        if self.count > 1:
            self._low.zero_()  # what the first vector leaves there
        self.count = 0

    def add(self, vector: torch.Tensor) -> None:
        """Add one vector."""
        if not self.count:
            self._high.copy_(vector)
        else:
            for part in _parts(len(vector)):
                high, addend = self._high[part], vector[part].double()
                total = high + addend
                rounded = total - high
                self._low[part] += (high - (total - rounded)) + (addend - rounded)
                high.copy_(total)
        self.count += 1

    def mean(self, part: slice) -> torch.Tensor:
        """Mean of what was added, float64, of some elements."""
        mean: torch.Tensor = (self._high[part] + self._low[part]) / self.count
        return mean


class FirstHalf(TorchHalf):
    """Weights, optimiser and arithmetic of the server half on one torch device."""

    def __init__(
        self, module: nn.Module, weights: Vector, *, rule: OptimiserRule, device: torch.device
    ) -> None:
        super().__init__(module, device)
        size = len(weights)
        self._base, self._working = aligned_rows(2, size, device)
        bind(self._module, self._working)
        parameters = list(self._module.parameters())
        for parameter in parameters:
            parameter.requires_grad_()
        self._optimiser = build_optimiser(rule, parameters)
        self._state = OptimiserState(rule, self._optimiser, parameters)
        self._base_state = torch.empty(0, device=device)  # empty: no step was made yet
        # A copy as it is added: weights, then optimiser state.
        self._copy = torch.empty(size + self._state.size, device=device)
        self._sum = ExactSum(size + self._state.size, device)
        self._held: tuple[int, int] | None = None  # device and steps of the working copy
        self.load(weights)

    def load(self, weights: Vector) -> None:
        """Take over the base weights (d_s,)."""
        self._base.copy_(torch.from_numpy(weights))
        self._held = None

    def restore(self, state: Vector) -> None:
        """Take over the base's optimiser state (n,), empty before the first step."""
        self._base_state = torch.from_numpy(state.copy()).to(self._device)
        self._held = None

    @property
    def weights(self) -> Vector:
        """The base weights (d_s,)."""
        found: Vector = self._base.cpu().numpy()
        return found

    @property
    def optimiser_state(self) -> Vector:
        """The base's optimiser state (n,)."""
        found: Vector = self._base_state.cpu().numpy()
        return found

    def takes_state(self, state: Vector) -> bool:
        """Whether a vector can be an optimiser state of this half."""
        return len(state) in (0, self._state.size)

    def start_round(self, _number: int, eta: float) -> None:
        """Steps from here on have this size, and are averaged with each other."""
        for group in self._optimiser.param_groups:
            group["lr"] = eta
        self._sum.clear()
        self._held = None

    def steps(self, turns: Sequence[Turn], guards: Guards | None = None) -> list[list[float]]:
        """The next step of the one device in `turns`; returns its loss before it, [[loss]].

        A device's steps follow each other: those of another one begin a copy anew.
        """
        (turn,) = turns
        if self._held != (turn.device, len(turn.done)):
            assert not turn.done, "a copy is not rebuilt in first order"
            with torch.no_grad():
                self._working.copy_(self._base)
            self._state.write(self._base_state)
        self._optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = functional.cross_entropy(self._module(own_copy(turn.batch.h)), turn.batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._held = turn.device, len(turn.done) + 1
        if guards is not None and not turn.done:
            guards.observe(turn.device, float(loss.detach()))
        return [[as_float32(float(loss.detach()))]]

    @torch.no_grad()
    def keep(self) -> bool:
        """Take the working copy into the average; False, and not, when it is not finite."""
        size = len(self._working)
        self._copy[:size] = self._working
        self._state.read(self._copy[size:])
        finite = all(bool(torch.isfinite(self._copy[p]).all()) for p in _parts(len(self._copy)))
        if finite:
            self._sum.add(self._copy)
        return finite

    @torch.no_grad()
    def after(self, eta_g: float) -> Vector:
        """What `commit` would make of the base weights (d_s,)."""
        if not self._sum.count:
            return self.weights.copy()
        after = torch.empty_like(self._base)
        for part in _parts(len(after)):
            base = self._base[part].double()
            after[part] = base + eta_g * (self._sum.mean(part) - base)
        found: Vector = after.cpu().numpy()
        return found

    @torch.inference_mode()
    def pooled_loss(self, weights: Vector, batches: Sequence[ActivationBatch]) -> float:
        """Mean loss of weights (d_s,) on the activations of several devices."""
        self._working.copy_(torch.from_numpy(weights))
        self._held = None
        return self._pooled_loss(batches)

    @torch.no_grad()
    def commit(self, eta_g: float) -> None:
        """Step the base: x += eta_g (mean of the copies - x); the optimiser state is their mean."""
        if self._sum.count:
            size = len(self._working)
            for part in _parts(size):
                base = self._base[part].double()
                self._base[part] = base + eta_g * (self._sum.mean(part) - base)
            state = torch.empty_like(self._copy[size:])
            for part in _parts(len(state)):
                state[part] = self._sum.mean(slice(size + part.start, size + part.stop))
            self._base_state = state
        self._sum.clear()
        self._held = None

    @torch.no_grad()
    def measure(
        self, device: int, batch: ActivationBatch, differences: Vector, done: list[list[float]]
    ) -> list[float]:
        """L(x_s^tau; h + d/2) - L(x_s^tau; h - d/2) for each d of `differences` (K, *h.shape)."""
        assert self._held == (device, len(done)), "a copy is not rebuilt in first order"
        return self._loss_differences(batch, differences)

    def cut_gradient(self, device: int, batch: ActivationBatch, done: list[list[float]]) -> Vector:
        """dL/dh (batch, *activation shape) of the mean loss over `batch` at x_s^tau."""
        assert self._held == (device, len(done)), "a copy is not rebuilt in first order"
        return self._gradient(batch)

    @torch.no_grad()
    def evaluate(self, h: Vector, labels: NDArray[np.int64]) -> Scores:
        """Scores of the base weights on activations h (n, *activation shape)."""
        self._working.copy_(self._base)
        self._held = None
        return self._scores(h, labels)


def _parts(size: int) -> Iterator[slice]:
    return (slice(first, min(first + _CHUNK, size)) for first in range(0, size, _CHUNK))
