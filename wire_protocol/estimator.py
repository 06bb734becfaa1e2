"""The arithmetic of the zeroth-order step, shared by devices, server and replay.

Only multiplications and divisions in float64, one rounding to float32, and one float32 addition
an element: any IEEE-754 machine gets the same bits. Two-point estimate (Spall 1992; MU-SplitFed,
arXiv 2510.21155, section 3): g = mean over k of delta_k / (2 lam) * u_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.directions import DirectionGenerator, DirectionId, Stream
from wire_protocol.messages import Commit

Vector = NDArray[np.float32]


class Term(NamedTuple):
    """One addend of an update: scale * u(direction)."""

    direction: DirectionId
    scale: float


def step_scale(eta: float, lam: float, directions: int, weight: float = 1.0) -> float:
    """Factor c such that an update adds -c * delta_k * u_k for each of `directions` k."""
    return weight * eta / (directions * 2.0 * lam)


def client_terms(
    run_seed: int, lam: float, commit: Commit, eta: float | None = None
) -> Iterable[Term]:
    """Terms of one commit: devices ascending, then k; eta_g times the mean client step.

    `eta` stands in for the commit's eta_c.
    """
    eta = commit.eta_c if eta is None else eta
    for entry in commit.entries:
        scalars = np.frombuffer(entry.scalars, "<f4")
        if not scalars.size:
            continue
        scale = step_scale(eta, lam, scalars.size, commit.eta_g * entry.weight)
        drawn = commit.round - entry.staleness
        for k, delta in enumerate(scalars.tolist()):
            yield Term(
                DirectionId(run_seed, Stream.CLIENT_HALF, entry.device, drawn, 0, k),
                -scale * delta,
            )


def server_terms(
    run_seed: int, device: int, round_number: int, scalars: Sequence[Sequence[float]], scale: float
) -> Iterable[Term]:
    """Terms of one device's server steps; scalars[step][k], in that order."""
    for step, row in enumerate(scalars):
        for k, delta in enumerate(row):
            yield Term(
                DirectionId(run_seed, Stream.SERVER_HALF, device, round_number, step, k),
                -scale * delta,
            )


def apply_terms(weights: Vector, terms: Iterable[Term], generator: DirectionGenerator) -> None:
    """Weights (d,) += sum of the terms, in place and in the order given: order fixes the bits."""
    for term in terms:
        generator.add_scaled(term.direction, term.scale, weights, weights)
