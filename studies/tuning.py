"""The choice among the trials of an arm. It sees results of the validation split only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from studies.cells import Point, Result


def choose(trials: Sequence[Sequence[Result]], by: str, targets: Sequence[float]) -> int:
    """Index of the best trial; the first of equals. `trials` holds the seeds' results of each.

    Those that diverged with any seed come last. `by` "rounds" or "seconds": until the first of
    the `targets` is reached, in the mean; then, as for "accuracy", the mean accuracy decides.
    """
    ranks = [_rank(results, by, targets) for results in trials]
    return ranks.index(min(ranks))


def rounds_to(points: Sequence[Point], target: float) -> int | None:
    """Rounds done when the accuracy was first seen at the target; None: never."""
    return next((point.round for point in points if point.accuracy >= target), None)


def seconds_to(points: Sequence[Point], target: float) -> float | None:
    """Simulated seconds until then; None: never, or there is no simulated time."""
    return next((point.simulated_s for point in points if point.accuracy >= target), None)


def _rank(
    results: Sequence[Result], by: str, targets: Sequence[float]
) -> tuple[bool, float, float]:
    """The smaller the better."""
    cost = 0.0
    if by != "accuracy":
        reach = rounds_to if by == "rounds" else seconds_to
        costs = [reach(result.points, targets[0]) for result in results]
        cost = statistics.mean(math.inf if c is None else float(c) for c in costs)
    accuracies = [result.points[-1].accuracy if result.points else 0.0 for result in results]
    return (
        any(result.outcome != "complete" for result in results), cost,
        -statistics.mean(accuracies),
    )  # fmt: skip
