"""Activations of each label as a Gaussian, kept up to date: the generator of GAS.

Source: Yang & Liu (arXiv 2409.01251), equations (11) and (12), and the authors' code
(github.com/eejiarong/GAS, GAS_main.py and utils/utils.py), which merges a whole buffer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

# The authors add a multiple of the identity until Cholesky succeeds, ten times more at each try.
_JITTER: Final = 1e-6
_TRIES: Final = 20

Covariance = Literal["full", "diagonal"]


@dataclass
class _Gaussian:
    weight: float
    mean: torch.Tensor  # (elements,)
    covariance: torch.Tensor  # (elements, elements), or (elements,): variances


class LabelGaussians:
    """Weighted mean and covariance of the activations of each label, (elements,) when flat.

    Full covariances are classes x elements^2 numbers; the authors advise variances alone where
    that is too much.
    """

    def __init__(self, classes: int, covariance: Covariance) -> None:
        self._covariance = covariance
        self._of: list[_Gaussian | None] = [None] * classes

    @property
    def complete(self) -> bool:
        """True when every label was seen."""
        return None not in self._of

    def update(self, h: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> None:
        """Merge activations h (n, elements) with labels (n,) and positive weights s (n,)."""
        for label in sorted(set(labels.tolist())):
            mask = labels == label
            self._of[label] = _merged(self._of[label], self._measured(h[mask], weights[mask]))

    def moments(self, label: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance (or variances) of a label that was seen."""
        gaussian = self._of[label]
        assert gaussian is not None
        return gaussian.mean, gaussian.covariance

    def sample(self, label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw activations (count, elements) of a label that was seen."""
        mean, covariance = self.moments(label)
        noise = torch.randn(count, len(mean), generator=generator).to(mean.device)
        if covariance.ndim == 1:
            return mean + noise * covariance.sqrt()
        return mean + noise @ _root(covariance).T

    def _measured(self, h: torch.Tensor, weights: torch.Tensor) -> _Gaussian:
        total = float(weights.sum())
        shares = (weights / total)[:, None]
        mean = (shares * h).sum(0)
        centred = h - mean
        if self._covariance == "full":
            return _Gaussian(total, mean, (shares * centred).T @ centred)
        return _Gaussian(total, mean, (shares * centred.square()).sum(0))


def _merged(old: _Gaussian | None, new: _Gaussian) -> _Gaussian:
    """Moments of both sets together: equations (11) and (12) for sets instead of one sample."""
    if old is None:
        return new
    weight = old.weight + new.weight
    share = new.weight / weight
    mean = torch.lerp(old.mean, new.mean, share)

    def around(gaussian: _Gaussian) -> torch.Tensor:
        shift = gaussian.mean - mean
        square = torch.outer(shift, shift) if gaussian.covariance.ndim == 2 else shift.square()
        return gaussian.covariance + square

    return _Gaussian(weight, mean, torch.lerp(around(old), around(new), share))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """A Cholesky factor, of the covariance plus as much of the identity as it takes."""
    identity = torch.eye(len(covariance), device=covariance.device)
    jitter = _JITTER
    for _ in range(_TRIES):
        root: torch.Tensor
        root, info = torch.linalg.cholesky_ex(covariance + jitter * identity)
        if not info:
            return root
        jitter *= 10
    return torch.diag(covariance.diagonal().clamp(min=0).sqrt())
