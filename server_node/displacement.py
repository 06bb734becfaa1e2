"""How far a commit moves each device's activation: what the client half's backtracking goes by.

The server never sees the client half, but the differences d_k = h+ - h- are its derivative along
the device's own directions: d_k / (2 lam) = J u_k. The device's part of the commit,
-eta_g w eta_c / K sum_k delta_k / (2 lam) u_k, so moves its activation by

    -eta_g w eta_c / K sum_k delta_k d_k / (2 lam)^2

to first order. What other devices' directions add to it is not known here. The weight w stays in:
along own directions the curvature that bounds a step is K-direction noise, which the averaging over
devices divides by their number, and w divides the own part's by the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from server_node.config import Config
from server_node.journal import RoundClosed


class Displacements:
    """Sums of delta_k d_k by device of the open round: one activation each, in float64.

    Sums in float64 hide in which order the groups came.
    """

    def __init__(self, config: Config) -> None:
        method = config.method
        # Adam's step does not shrink with its estimate; of the cut gradient there are no d_k.
        self._wanted = (
            config.guards.backtrack_client
            and method.feedback == "loss_difference"
            and method.client_optimiser != "adam"
        )
        self._lam = method.lam
        self._device = torch.device(config.server.device)
        self._sums: dict[int, NDArray[np.float64]] = {}

    def add(self, device: int, scalars: Sequence[float], differences: NDArray[np.float32]) -> None:
        """Take in some directions: scalars (n,) and differences (n, *activation shape)."""
        if self._wanted and len(scalars):
            part = np.tensordot(np.asarray(scalars), differences.astype(np.float64), axes=1)
            self._sums[device] = self._sums.get(device, 0.0) + part

    def clear(self) -> None:
        """A round begins."""
        self._sums.clear()

    def of(self, record: RoundClosed) -> list[torch.Tensor] | None:
        """Displacement of the activation of each share's device; None when not all are known.

        They are forgotten: a device's next directions belong to another commit.
        """
        if not record.shares or not all(share.device in self._sums for share in record.shares):
            return None
        moved: list[torch.Tensor] = []
        for share in record.shares:
            directions = len(share.client_scalars) // 4
            scale = -record.eta_g * share.weight * record.eta_c / directions / (2 * self._lam) ** 2
            displacement = (scale * self._sums.pop(share.device)).astype(np.float32)
            moved.append(torch.from_numpy(displacement).to(self._device))
        return moved
