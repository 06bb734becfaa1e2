"""Which settings to measure: those that may beat the best time found, until a budget is spent.

Time to the target is rounds (measured, slow) times seconds a round (modelled, at once). A setting
is measured when a surrogate of the rounds expects most of it, and no longer than until it has
taken the best time so far. The order depends on nothing but the arguments: a table that holds the
answers already changes the waiting, not the advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np

from studies.planner.choice import Probe
from studies.planner.learning import Observed
from studies.planner.surrogate import Surrogate, expected_gain, prior

# A setting that did not get there within its limit is taken to need so many times as long.
_CENSORED: Final = 1.5
# Ends the search: an expected gain of less than this part of the best time.
_LEAST_GAIN: Final = 0.001
_RULE_LEVEL: Final = 1

Observe = Callable[[Probe, int], Observed]


class Found(NamedTuple):
    """What was measured, in that order: rounds, or None beyond the limit it was given."""

    probe: Probe
    rounds: int | None
    limit: int
    diverged: bool


def search(
    round_s: Mapping[Probe, float], observe: Observe, budget: int, most_rounds: int, least: int
) -> list[Found]:
    """Measure at most `budget` of the settings in `round_s`, seconds a round of each.

    A setting runs `most_rounds` at most, and `least` rounds at least.
    """
    found: list[Found] = []
    left = list(round_s)
    first = _first_settings(round_s)
    while left and len(found) < budget:
        best_s = best_time_s(found, round_s)
        probe = first.pop(0) if first else _most_promising(left, found, round_s, best_s)
        if probe is None:
            break
        if probe not in left:  # it lies beyond one that diverged
            continue
        limit = most_rounds
        if best_s < math.inf:
            limit = max(least, min(most_rounds, math.ceil(best_s / round_s[probe])))
        seen = observe(probe, limit)
        found.append(Found(probe, seen.rounds, limit, seen.diverged))
        left.remove(probe)
        if seen.diverged:
            left = [other for other in left if not _beyond(other, probe)]
    return found


def best_time_s(found: list[Found], round_s: Mapping[Probe, float]) -> float:
    """The shortest time to the target of all that was measured; infinity when none got there."""
    times = [one.rounds * round_s[one.probe] for one in found if one.rounds is not None]
    return min(times, default=math.inf)


def _first_settings(round_s: Mapping[Probe, float]) -> list[Probe]:
    """Of each cut (and choice of weights) the one that should be fastest by the rule alone."""
    kinds: dict[object, list[Probe]] = {}
    for probe in round_s:
        if probe.level == _RULE_LEVEL:
            kinds.setdefault((probe.cut, probe.perturb), []).append(probe)
    firsts: list[Probe] = []
    for probes in kinds.values():
        ln_s = prior(probes) + np.log([round_s[p] for p in probes])
        firsts.append(probes[int(np.argmin(ln_s))])
    return firsts


def _most_promising(
    left: list[Probe], found: list[Found], round_s: Mapping[Probe, float], best_s: float
) -> Probe | None:
    # Where something diverged says little of the smaller steps beside it.
    told = [one for one in found if not one.diverged] or found
    surrogate = Surrogate(
        [one.probe for one in told],
        [math.log(one.rounds or _CENSORED * one.limit) for one in told],
    )
    mean, deviation = surrogate.predict(left)
    ln_s = mean + np.log([round_s[probe] for probe in left])
    if best_s == math.inf:  # nothing got there yet: the shortest time that is expected
        return left[int(np.argmin(ln_s))]
    gain = expected_gain(ln_s, deviation, math.log(best_s))
    index = int(np.argmax(gain))
    return left[index] if gain[index] >= _LEAST_GAIN else None


def _beyond(other: Probe, diverged: Probe) -> bool:
    """True where larger steps than those that diverged would be taken."""
    same = other._replace(level=diverged.level) == diverged
    return same and other.level > diverged.level
