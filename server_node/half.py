"""The server half: tau unbalanced zeroth-order steps, loss differences, evaluation.

Memory is constant in the number of devices: a base, R working copies and the scratch for their
perturbations. A device's copy x_s^m is a function of the base and its journaled scalars, so it is
rebuilt when the server comes back to that device (MU-SplitFed keeps M replicas instead;
arXiv 2510.21155, alg. 1). R = 1 unless the configuration asks for steps in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from server_node.errors import ConfigError
from server_node.flat import aligned_rows, bind, parameter_views
from server_node.guards import Guards
from server_node.signs import NumpySigns, Signs
from server_node.torch_directions import TorchSigns
from server_node.torch_half import ActivationBatch, Scores, TorchHalf, Turn, as_float32
from wire_protocol.directions import DirectionId, Stream
from wire_protocol.estimator import step_scale

# Directions of a step whose signs are kept for its update: as large as one float32 vector.
_DIRECTIONS_KEPT: Final = 32
# Batched and single outputs come from different kernels; float32 agrees far better than this.
_BATCHED_RELATIVE_ERROR: Final = 1e-4
# Directions of this round are drawn for probes; no run is that long.
_PROBE_ROUND: Final = (1 << 32) - 1

Vector = NDArray[np.float32]


class ServerHalf(TorchHalf):
    """Weights and arithmetic of the server half on one torch device.

    With `replicas` R > 1 the steps of up to R devices are computed at once. The batch has R places
    whether all are taken or not, and a device's place does not depend on what else is computed:
    its scalars have the same bits in whatever company.
    """

    def __init__(
        self, module: nn.Module, weights: Vector, *, run_seed: int, lam: float,
        directions: int, device: torch.device, replicas: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(module, device)
        self._run_seed = run_seed
        self._lam = lam
        self._directions = directions
        self._replicas = replicas
        self._signs: Signs = TorchSigns(device) if device.type == "cuda" else NumpySigns()
        self._base = aligned_rows(1, len(weights), device)[0]
        self._working = aligned_rows(replicas, len(weights), device)
        # Both sides of every copy; a single copy has them one after the other.
        sides = 1 if replicas == 1 else 2 * replicas
        self._perturbed = aligned_rows(sides, len(weights), device)
        self._scratch = self._perturbed[0]
        self._batches: ActivationBatch | None = None  # of both sides: (2 R, batch, ...)
        self._eta = 0.0
        self._round = -1
        # Device and steps of the copies that the rows of `_working`, and `_scratch`, hold.
        self._held: list[tuple[int, int] | None] = [None] * replicas
        self._scratch_holds: tuple[int, int] | None = None
        bind(self._module, self._scratch)
        self._outputs = torch.func.vmap(self._output)
        self.load(weights)

    def load(self, weights: Vector) -> None:
        """Take over the base weights (d_s,)."""
        self._base.copy_(torch.from_numpy(weights))
        self._forget()

    def start_round(self, number: int, eta: float) -> None:
        """Steps from here on belong to this round and have this size."""
        self._round, self._eta = number, eta
        self._forget()

    @torch.inference_mode()
    def check_batching(self, shape: Sequence[int]) -> None:
        """Try a batched forward on made-up activations of `shape` (batch, *activation shape).

        Raises ConfigError when the half cannot be computed in batches, or gives other numbers.
        """
        h = torch.linspace(-1.0, 1.0, int(np.prod(shape)), device=self._device).reshape(*shape)
        self._perturbed.copy_(self._base)
        want = self._module(h.clone())
        try:
            got = self._outputs(self._perturbed, h.expand(len(self._perturbed), *shape).clone())
            error = float((got - want).abs().max())
        except Exception as cause:  # the half may be the user's own
            why = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise ConfigError(
                f"server.replicas: torch.func.vmap cannot compute this server half ({why}); "
                "use --set server.replicas=1"
            ) from cause
        if not error <= _BATCHED_RELATIVE_ERROR * max(1.0, float(want.abs().max())):
            raise ConfigError(
                f"server.replicas: the outputs of this server half differ by {error:.1e} between "
                "steps in a batch and steps one by one; use --set server.replicas=1"
            )

    @torch.inference_mode()
    def steps(self, turns: Sequence[Turn], guards: Guards | None = None) -> list[list[float]]:
        """The next step of each device, all slots distinct; returns the K_s scalars of each.

        scalars[k] = L(x + lam u_k; h) - L(x - lam u_k; h), then x -= eta mean_k(...) u_k.
        Guards may change them: what is returned was applied.
        """
        for turn in turns:
            self._take(turn)
        # An empty place computes on what is left there; nobody reads its result.
        origins = [self._direction(0, 0)] * self._replicas
        for turn in turns:
            origins[turn.slot] = self._direction(turn.device, len(turn.done))
        kept: list[Any] = []
        scalars: list[list[float]] = [[] for _ in turns]
        before = [0.0] * len(turns)  # mean loss of all sides: the copy's, but for O(lam^2)
        for k in range(self._directions):
            packed = self._draw(origins, k)
            if k < _DIRECTIONS_KEPT:
                kept.append(packed)
            plus, minus = self._sides(turns, packed)
            for i, (turn, row) in enumerate(zip(turns, scalars, strict=True)):
                row.append(as_float32(plus[turn.slot] - minus[turn.slot]))
                before[i] += (plus[turn.slot] + minus[turn.slot]) / (2 * self._directions)
        if guards is not None:
            scalars = _shaped(turns, scalars, before, guards)
        judged = guards is not None and guards.rejects
        self._apply(turns, scalars, origins, kept, self._perturbed if judged else self._working)
        if guards is not None and judged:
            self._judge(turns, scalars, before, guards)
        for turn in turns:
            self._held[turn.slot] = (turn.device, len(turn.done) + 1)
        return scalars

    def _apply(
        self, turns: Sequence[Turn], scalars: list[list[float]], origins: list[DirectionId],
        kept: list[Any], rows: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write the copies after these steps to the first `rows`."""
        after = rows[: self._replicas]
        for k in range(self._directions):
            scales = [0.0] * self._replicas
            for turn, row in zip(turns, scalars, strict=True):
                scales[turn.slot] = self._addend(row[k])
            packed = kept[k] if k < len(kept) else self._draw(origins, k)
            self._signs.add(packed, scales, after if k else self._working, after)

    def _judge(
        self, turns: Sequence[Turn], scalars: list[list[float]], before: list[float],
        guards: Guards,
    ) -> None:  # fmt: skip
        """Keep the candidates in `_perturbed` that do not raise their batch's loss.

        The scalars of the others become zeros, and are applied as such: a copy that is rebuilt
        from them has the same bits, signs of zeros included.
        """
        losses = self._candidate_losses(turns)
        for i, turn in enumerate(turns):
            row = self._working[turn.slot : turn.slot + 1]
            if guards.accepts(turn.device, before[i], losses[turn.slot]):
                row.copy_(self._perturbed[turn.slot])
                continue
            scalars[i] = [0.0] * self._directions
            self._replay_step(row, turn.device, len(turn.done), scalars[i])

    @torch.inference_mode()
    def measure(
        self, device: int, batch: ActivationBatch, differences: Vector, done: list[list[float]]
    ) -> list[float]:
        """L(x_s^tau; h + d/2) - L(x_s^tau; h - d/2) for each d of `differences` (K, *h.shape)."""
        self._copy_into_scratch(device, done)
        return self._loss_differences(batch, differences)

    def cut_gradient(self, device: int, batch: ActivationBatch, done: list[list[float]]) -> Vector:
        """dL/dh (batch, *activation shape) of the mean loss over `batch` at x_s^tau."""
        with torch.inference_mode():
            self._copy_into_scratch(device, done)
        return self._gradient(batch)

    @torch.inference_mode()
    def evaluate(self, h: Vector, labels: NDArray[np.int64]) -> Scores:
        """Scores of the base weights on activations h (n, *activation shape)."""
        self._scratch.copy_(self._base)
        self._scratch_holds = None
        return self._scores(h, labels)

    # -- pooled activations ------------------------------------------------------------------

    @torch.inference_mode()
    def pooled_loss(self, weights: Vector, batches: Sequence[ActivationBatch]) -> float:
        """Mean loss of weights (d_s,) on the activations of several devices."""
        self._scratch.copy_(torch.from_numpy(weights))
        self._scratch_holds = None
        return self._pooled_loss(batches)

    @torch.inference_mode()
    def second_difference(
        self, batches: Sequence[ActivationBatch], lam: float, probes: int
    ) -> float:
        """Mean over random u of (L(x + lam u) + L(x - lam u) - 2 L(x)) / lam^2, x the base."""
        self._scratch.copy_(self._base)
        self._scratch_holds = None
        middle = self._pooled_loss(batches)
        total = 0.0
        origin = DirectionId(self._run_seed, Stream.SERVER_HALF, 0, _PROBE_ROUND, 0, 0)
        for k in range(probes):
            packed = self._draw([origin], k)
            for side in (lam, -lam):
                self._signs.add(packed, [side], self._base[None], self._perturbed[:1])
                total += self._pooled_loss(batches) - middle
        return total / probes / lam**2

    def root_mean_square(self) -> float:
        """Of the base weights."""
        return float(self._base.double().square().mean().sqrt())

    # -- copies ------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._held = [None] * self._replicas
        self._scratch_holds = None

    def _take(self, turn: Turn) -> None:
        """Make the row of a slot the copy of its device, and its batch the device's."""
        want = (turn.device, len(turn.done))
        if self._held[turn.slot] == want:
            return
        self._rebuild(self._working[turn.slot : turn.slot + 1], turn.device, turn.done)
        self._held[turn.slot] = want
        if self._replicas == 1:
            return
        if self._batches is None:
            sides = 2 * self._replicas
            h, labels = turn.batch
            self._batches = ActivationBatch(
                h.new_zeros(sides, *h.shape), labels.new_zeros(sides, *labels.shape)
            )
        for row in (turn.slot, self._replicas + turn.slot):
            self._batches.h[row] = turn.batch.h
            self._batches.labels[row] = turn.batch.labels

    def _copy_into_scratch(self, device: int, done: list[list[float]]) -> None:
        """Make `_scratch` the copy of `device` after the steps `done`; other copies stay."""
        want = (device, len(done))
        if self._scratch_holds == want:
            return
        if want in self._held:
            self._scratch.copy_(self._working[self._held.index(want)])
        else:
            self._rebuild(self._perturbed[:1], device, done)
        self._scratch_holds = want

    def _rebuild(self, row: torch.Tensor, device: int, done: list[list[float]]) -> None:
        """Make `row` (1, d_s) the copy of `device` after the steps `done`."""
        row.copy_(self._base)
        for step, scalars in enumerate(done):
            self._replay_step(row, device, step, scalars)

    def _replay_step(self, row: torch.Tensor, device: int, step: int, scalars: list[float]) -> None:
        origin = self._direction(device, step)
        for k, delta in enumerate(scalars):
            self._signs.add(self._draw([origin], k), [self._addend(delta)], row, row)

    def _addend(self, delta: float) -> float:
        return -step_scale(self._eta, self._lam, self._directions) * delta

    def _direction(self, device: int, step: int) -> DirectionId:
        return DirectionId(self._run_seed, Stream.SERVER_HALF, device, self._round, step, 0)

    def _draw(self, origins: list[DirectionId], k: int) -> Any:
        return self._signs.draw([o._replace(k=k) for o in origins], self._base.shape[0])

    # -- losses ------------------------------------------------------------------------------

    def _sides(self, turns: Sequence[Turn], packed: Any) -> tuple[list[float], list[float]]:
        """Mean losses of every slot at x + lam u and at x - lam u.

        The half gets a copy of h: its first layer may work in place.
        """
        self._scratch_holds = None
        count = self._replicas
        sides = []
        if count == 1:
            for lam in (self._lam, -self._lam):
                self._signs.add(packed, [lam], self._working, self._perturbed)
                losses = self._losses(turns[0].batch.h.clone(), turns[0].batch.labels)
                sides.append([float(losses.double().mean())])
            return sides[0], sides[1]
        assert self._batches is not None  # a turn was taken
        self._signs.add(packed, [self._lam] * count, self._working, self._perturbed[:count])
        self._signs.add(packed, [-self._lam] * count, self._working, self._perturbed[count:])
        logits = self._outputs(self._perturbed, self._batches.h.clone())
        labels = self._batches.labels
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        ).reshape(labels.shape)
        means: list[float] = losses.double().mean(dim=1).tolist()
        return means[:count], means[count:]

    def _candidate_losses(self, turns: Sequence[Turn]) -> list[float]:
        """Mean losses of every slot at the weights in `_perturbed`."""
        count = self._replicas
        if count == 1:
            losses = self._losses(turns[0].batch.h.clone(), turns[0].batch.labels)
            return [float(losses.double().mean())]
        assert self._batches is not None  # a turn was taken
        logits = self._outputs(self._perturbed[:count], self._batches.h[:count].clone())
        labels = self._batches.labels[:count]
        losses = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        ).reshape(labels.shape)
        means: list[float] = losses.double().mean(dim=1).tolist()
        return means

    def _output(self, weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """The half with weights (d_s,) on h (batch, ...): logits (batch, classes)."""
        state = {name: view for name, _, view in parameter_views(self._module, weights)}
        logits: torch.Tensor = torch.func.functional_call(self._module, state, (h,))
        return logits


def _shaped(
    turns: Sequence[Turn], scalars: list[list[float]], before: list[float], guards: Guards
) -> list[list[float]]:
    """The scalars to apply of the measured ones; `before` are the losses of the turns' batches."""
    rows = [
        guards.shape(turn.device, turn.done, row) for turn, row in zip(turns, scalars, strict=True)
    ]
    for turn, loss in zip(turns, before, strict=True):
        if not turn.done:
            guards.observe(turn.device, loss)
    return rows
