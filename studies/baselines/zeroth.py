"""Zeroth-order pieces of the baselines, and SplitFed with both sides zeroth-order.

Source of the latter: MU-SplitFed (arXiv 2510.21155), which calls its own algorithm at tau = 1
"vanilla SplitFed": per-client replicas of both halves, one two-point step each, both averaged.
That is a configuration of our method, not another program; the departures of our method
(docs/architecture.md) are its departures.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from server_node.config import Config
from studies.harness import TorchHalf
from wire_protocol.directions import DirectionGenerator, DirectionId
from wire_protocol.estimator import step_scale


def zo_splitfed(config: Config) -> Config:
    """The configuration with one zeroth-order server step a barrier round; all else as it is."""
    method = msgspec.structs.replace(
        config.method, tau=1, tau_mode="fixed", server_order="zeroth", feedback="loss_difference",
        server_batch="device", reuse_rounds=0, server_optimiser="SGD", server_options={},
    )  # fmt: skip
    barrier = msgspec.structs.replace(config.round, mode="barrier")
    return msgspec.structs.replace(config, method=method, round=barrier)


class TwoPoint:
    """Two-point estimates along seeded +-1 directions, as the method's."""

    def __init__(self, half: TorchHalf, lam: float) -> None:
        self._half, self._lam = half, lam
        self._generator = DirectionGenerator()

    @torch.no_grad()
    def both_sides(
        self, direction: DirectionId, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `compute` gives with weights x + lam u and x - lam u; the weights are restored."""
        kept = self._half.flat.clone()
        step = self._signs(direction) * self._lam
        self._half.load(kept + step)
        plus = compute()
        self._half.load(kept - step)
        minus = compute()
        self._half.load(kept)
        return plus, minus

    def gradient(self, origin: DirectionId, deltas: list[float]) -> torch.Tensor:
        """The estimate (d,): mean over k of delta_k / (2 lam) u_k; `origin` has k = 0."""
        total = torch.zeros_like(self._half.flat)
        scale = step_scale(1.0, self._lam, len(deltas))
        for k, delta in enumerate(deltas):
            total.add_(self._signs(origin._replace(k=k)), alpha=scale * delta)
        return total

    def _signs(self, direction: DirectionId) -> torch.Tensor:
        flat = self._half.flat
        return torch.from_numpy(self._generator.signs(direction, 0, flat.numel())).to(flat.device)
