"""What an advice takes on the virtual clock."""

from __future__ import annotations

from studies.planner.choice import Choice
from studies.planner.cuts import CutCost
from studies.planner.fleet import Fleet
from studies.planner.timing import Traffic, draw_rounds, round_seconds
from server_node.config import Config


def simulated_s(
    fleet: Fleet, config: Config, cut: CutCost, choice: Choice, sent: Traffic, rounds: int
) -> float:
    """Seconds of rounds 0, 1, .. with the delays that a run of this seed draws."""
    draws = draw_rounds(fleet, config, 0, rounds)
    return float(round_seconds(fleet, config, cut, choice, draws, sent).sum())
