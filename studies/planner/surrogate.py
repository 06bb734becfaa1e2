"""What is expected of settings that were not measured: a Gaussian process on ln(rounds).

Rounds fall with tau K as prototypes and docs/findings.md show; what a model makes of it is learned
from the measured settings. Rasmussen & Williams, "Gaussian Processes for Machine Learning" (2006),
algorithm 2.1, with fixed hyperparameters: a handful of points could not fit any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from studies.planner.choice import Probe

# Before anything is measured: rounds ~ tau^-0.4 (K K_s)^-0.25, half of the step more rounds.
_TAU_SLOPE: Final = -0.4
_K_SLOPE: Final = -0.25
_LEVEL_SLOPE: Final = -0.5
_DEVIATION: Final = 0.5  # of ln(rounds) around that
_NOISE: Final = 0.1
_OCTAVES: Final = 2.5  # over which settings tell of each other
_OTHER_CUT: Final = 0.6  # how much another cut, or other perturbed weights, tells
_LEVELS: Final = 1.0

Vector = NDArray[np.float64]


class Surrogate:
    """Mean and deviation of ln(rounds), given what was measured."""

    def __init__(self, probes: Sequence[Probe], ln_rounds: Sequence[float]) -> None:
        self._probes = list(probes)
        rest = np.array(ln_rounds) - prior(self._probes)
        gram = _kernel(self._probes, self._probes) + _NOISE**2 * np.eye(len(self._probes))
        inverse = np.linalg.inv(gram)
        # The level common to all is estimated from the points themselves (ordinary kriging).
        ones = np.ones(len(self._probes))
        self._level = float(ones @ inverse @ rest / (ones @ inverse @ ones))
        self._inverse, self._weights = inverse, inverse @ (rest - self._level)

    def predict(self, probes: Sequence[Probe]) -> tuple[Vector, Vector]:
        """Means and standard deviations (n,) of ln(rounds)."""
        cross = _kernel(probes, self._probes)
        mean = prior(probes) + self._level + cross @ self._weights
        variance = _DEVIATION**2 - np.einsum("ij,jk,ik->i", cross, self._inverse, cross)
        return mean, np.sqrt(np.maximum(variance, 1e-6))


def expected_gain(mean: Vector, deviation: Vector, best: float) -> Vector:
    """By how much a normal variable is expected to fall below `best`, (n,)."""
    z = (best - mean) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
    gain: Vector = deviation * (z * below + density)
    return gain


def prior(probes: Sequence[Probe]) -> Vector:
    """ln(rounds) but for a constant, before anything is measured (n,)."""
    return np.array(
        [
            _TAU_SLOPE * math.log(p.tau)
            + _K_SLOPE * math.log(p.directions_client * p.directions_server)
            + _LEVEL_SLOPE * p.level
            for p in probes
        ]
    )


def _kernel(left: Sequence[Probe], right: Sequence[Probe]) -> Vector:
    def sizes(probes: Sequence[Probe]) -> Vector:
        rows = [
            [
                math.log2(p.tau) / _OCTAVES, math.log2(p.directions_client) / _OCTAVES,
                math.log2(p.directions_server) / _OCTAVES, p.level / _LEVELS,
            ]
            for p in probes
        ]  # fmt: skip
        return np.array(rows).reshape(len(probes), 4)

    squares = ((sizes(left)[:, np.newaxis] - sizes(right)[np.newaxis]) ** 2).sum(axis=2)
    alike = np.array([[(p.cut == q.cut, p.perturb == q.perturb) for q in right] for p in left])
    shared = np.where(alike.reshape(len(left), len(right), 2), 1.0, _OTHER_CUT).prod(axis=2)
    kernel: Vector = _DEVIATION**2 * np.exp(-0.5 * squares) * shared
    return kernel
