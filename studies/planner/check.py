"""What an advice takes on the virtual clock: the run itself, with its own seed's delays."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from emulation.simulate import simulate_curve
from server_node.config import Config
from server_node.samples import Dataset
from studies.planner.learning import EVERY


class Checked(NamedTuple):
    """A simulated run. Without the target reached, the first two are None."""

    rounds: int | None
    seconds: float | None
    accuracy: float | None  # at its end


def check(config: Config, data: Dataset, target: float) -> Checked:
    """Simulate a plan's configuration on its whole training set, scored on the test set."""
    evaluation = msgspec.structs.replace(config.evaluation, every=EVERY, control=False)
    result, rows = simulate_curve(msgspec.structs.replace(config, evaluation=evaluation), data)
    accuracy = result.scores.accuracy if result.scores is not None else None
    for row in rows:
        if row.accuracy is not None and row.accuracy >= target:
            return Checked(row.round + 1, row.simulated_s, accuracy)
    return Checked(None, None, accuracy)
