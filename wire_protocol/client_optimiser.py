"""How a commit's estimate becomes a step of the client half: SGD, momentum, Adam.

Device, server and replay share it. Additions, multiplications, divisions and square roots of
IEEE-754, element by element and in a fixed order: the same bits on every machine.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire_protocol.directions import DirectionGenerator
from wire_protocol.estimator import apply_terms, client_terms
from wire_protocol.messages import ClientOptimiser, Commit

# Kingma & Ba, arXiv 1412.6980, algorithm 1.
_ADAM_EPSILON: Final = np.float32(1e-8)
# Vectors (d_c,) of the state, the weights included.
_SLOTS: Final[dict[ClientOptimiser, int]] = {"sgd": 1, "momentum": 2, "adam": 3}

Vector = NDArray[np.float32]


class ClientRule(NamedTuple):
    """The optimiser and its constants; `momentum` is Adam's beta_1."""

    optimiser: ClientOptimiser
    momentum: float
    beta2: float


class ClientState:
    """Weights and optimiser state of the client half in one vector: what a snapshot carries.

    `state` (slots * d_c,): the weights, then momentum, then Adam's second moment. Of SGD it is the
    weights alone.
    """

    def __init__(self, rule: ClientRule, weights: Vector) -> None:
        self.rule = rule
        slots = _SLOTS[rule.optimiser]
        self.state = np.zeros(slots * len(weights), np.float32)
        self.state[: len(weights)] = weights
        # Views: the weights (d_c,), and the other vectors of the state.
        self.theta, *self._moments = np.split(self.state, slots)
        self._estimate = np.empty(len(weights) if slots > 1 else 0, np.float32)

    def copy(self) -> ClientState:
        """An independent copy."""
        twin = ClientState(self.rule, self.theta)
        twin.state[...] = self.state
        return twin

    def start_over(self) -> None:
        """Forget what the optimiser remembers; the weights stay."""
        for moment in self._moments:
            moment.fill(0.0)

    def apply(
        self, commit: Commit, run_seed: int, lam: float, generator: DirectionGenerator
    ) -> None:
        """Step in place by one commit."""
        if self.rule.optimiser == "sgd":
            apply_terms(self.theta, client_terms(run_seed, lam, commit), generator)
            return
        self._estimate.fill(0.0)
        eta = commit.eta_c if self.rule.optimiser == "momentum" else 1.0
        apply_terms(self._estimate, client_terms(run_seed, lam, commit, eta), generator)
        if self.rule.optimiser == "momentum":
            (velocity,) = self._moments
            np.multiply(velocity, np.float32(self.rule.momentum), out=velocity)
            np.add(velocity, self._estimate, out=velocity)
            self._move(velocity)
        else:
            self._adam(commit.eta_c, commit.round + 1)

    def _adam(self, eta: float, steps: int) -> None:
        """`_estimate` holds the negative gradient: so does the first moment."""
        first, second = self._moments
        step = self._estimate
        beta1, beta2 = self.rule.momentum, self.rule.beta2
        np.multiply(first, np.float32(beta1), out=first)
        first += np.float32(1.0 - beta1) * step
        np.multiply(step, step, out=step)
        np.multiply(second, np.float32(beta2), out=second)
        second += np.float32(1.0 - beta2) * step
        np.divide(second, np.float32(1.0 - _power(beta2, steps)), out=step)
        np.sqrt(step, out=step)
        step += _ADAM_EPSILON
        np.divide(first, step, out=step)
        step *= np.float32(eta / (1.0 - _power(beta1, steps)))
        self._move(step)

    def _move(self, step: Vector) -> None:
        """Add a step; one of zeros changes no bit, not even that of a weight that is -0.0."""
        if step[:1].any() or step.any():  # a step is dense: one look is enough for most
            np.add(self.theta, step, out=self.theta)


def _power(base: float, exponent: int) -> float:
    """Base ** exponent by multiplications alone: C libraries differ in the last bit of pow."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
