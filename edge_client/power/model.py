"""What a board without a meter would draw, by its profile: modelled, never measured.

P = idle + (load - idle) * utilisation, where `load` is the board's draw with all cores busy. While
the device program computes, its utilisation is threads / cores; while it sends or waits, 0. Known
to be off by up to 40 % either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from edge_client.power.phases import COMPUTING, PHASES
from firmware_profiles.schema import Power
from wire_protocol.energy import Boundary, EnergyModelled, ModelledByPhase

BOUNDS: Final = 0.4


class BoardModel(NamedTuple):
    """The power of one board, idle and while this program computes."""

    board: str
    idle_w: float
    busy_w: float
    boundary: Boundary
    source: str

    @property
    def text(self) -> str:
        """The formula and its numbers, for the records."""
        return f"{self.idle_w:.2f} W idle, {self.busy_w:.2f} W computing"

    def energy(self, busy_s: float, idle_s: float) -> EnergyModelled:
        """The energy of so many seconds of either kind."""
        modelled_j = self.busy_w * busy_s + self.idle_w * idle_s
        return EnergyModelled(
            modelled_j=modelled_j,
            modelled_low_j=modelled_j * (1 - BOUNDS),
            modelled_high_j=modelled_j * (1 + BOUNDS),
            window_s=busy_s + idle_s,
            boundary=self.boundary,
            model=self.text,
            source=self.source,
        )

    def by_phase(self, seconds: Mapping[str, float]) -> ModelledByPhase:
        """The energy of a run so far, from the seconds of each of its PHASES."""
        joules = {
            phase: seconds[phase] * (self.busy_w if phase in COMPUTING else self.idle_w)
            for phase in PHASES
        }
        modelled_j = sum(joules.values())
        return ModelledByPhase(
            modelled_j=modelled_j,
            modelled_low_j=modelled_j * (1 - BOUNDS),
            modelled_high_j=modelled_j * (1 + BOUNDS),
            **{f"{phase}_modelled_j": value for phase, value in joules.items()},
            window_s=sum(seconds.values()),
            boundary=self.boundary,
            model=self.text,
            source=self.source,
        )


def board_model(board: str, power: Power, cores: int, threads: int) -> BoardModel:
    """The model of a board by its profile's name, power and cores; `threads` of them compute."""
    idle, load = power.idle, power.load
    utilisation = min(1.0, threads / cores)
    source = f"profile {board}: idle {idle.confidence}, load {load.confidence}"
    return BoardModel(
        board, idle.value_w, idle.value_w + (load.value_w - idle.value_w) * utilisation,
        idle.boundary, source,
    )  # fmt: skip
