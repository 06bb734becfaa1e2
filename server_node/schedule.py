"""Step sizes and weights. Only the server evaluates them; the journal carries what was used."""

from __future__ import annotations

import math


def step_factor(schedule: str, round_number: int, rounds: int) -> float:
    """Factor on eta_c and eta_s in a round: 1, or half a cosine from 1 towards 0."""
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * round_number / rounds))


def staleness_weight(staleness: int, power: float, participants: int) -> float:
    """Weight of a contribution that `staleness` commits have overtaken (asynchronous mode).

    Polynomial, as FedAsync's (Xie et al., arXiv 1903.03934, section 5.2). As many fresh ones as
    devices work at once weigh as much as one barrier round.
    """
    return math.pow(1.0 + staleness, -power) / participants
