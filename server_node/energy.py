"""The energy of a run, from its devices' reports: what was measured and what was modelled, apart.

A total over devices is a number only when every one of them has it, of one kind and at one
boundary; otherwise it is None, with the reason beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from wire_protocol.energy import Boundary, MeasuredByPhase, ModelledByPhase, NoEnergy, RunEnergy
from wire_protocol.messages import Report

# Of a window: with a longer hole between readings it has no energy (docs/energy.md).
_GAP_LIMIT: Final = 0.1
_OTHER: Final = {"measured": "modelled", "modelled": "measured"}
PHASES: Final = ("perturb", "forward", "encode", "radio", "replay", "wait")


class Total(NamedTuple):
    """Joules of all devices so far, of one kind."""

    joules: float
    low_j: float  # measured: less the uncertainty, coverage factor 2
    high_j: float
    net_j: float | None  # measured: less idle; None: idle was not measured everywhere
    by_phase: dict[str, float]
    boundary: Boundary


class SoFar(NamedTuple):
    """Joules of all devices, as reported when a round was closed."""

    measured: float | None
    modelled: float | None


class Energies:
    """The last account of every session of every device: each counts from its own zero."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[int, int], RunEnergy] = {}
        self._names: dict[int, str] = {}

    def add(self, index: int, device_id: str, report: Report) -> RunEnergy | None:
        """Take over what a session's run has taken so far; returns what it had taken before."""
        before = self._sessions.get((index, report.epoch))
        self._sessions[index, report.epoch] = report.energy
        self._names[index] = device_id
        return before

    def so_far(self) -> SoFar:
        """Both totals, where there are any."""
        measured, modelled = self.measured(), self.modelled()
        return SoFar(
            measured.joules if isinstance(measured, Total) else None,
            modelled.joules if isinstance(modelled, Total) else None,
        )

    def measured(self) -> Total | str:
        """The measured total, or why there is none."""
        return self._total(MeasuredByPhase, "measured")

    def modelled(self) -> Total | str:
        """The modelled total, or why there is none."""
        return self._total(ModelledByPhase, "modelled")

    def rows(self) -> list[dict[str, Any]]:
        """One a session, with everything that is known of it."""
        return [
            {"device": index, "device_id": self._names[index], "session": epoch,
             **msgspec.to_builtins(energy)}
            for (index, epoch), energy in sorted(self._sessions.items(), key=lambda item: item[0])
        ]  # fmt: skip

    def _total(self, kind: type[MeasuredByPhase | ModelledByPhase], word: str) -> Total | str:
        if not self._sessions:
            return "no device has reported"
        fitting = [energy for energy in self._sessions.values() if isinstance(energy, kind)]
        others = {i: e for (i, _), e in self._sessions.items() if not isinstance(e, kind)}
        if others:
            index, energy = next(iter(others.items()))
            why = energy.reason if isinstance(energy, NoEnergy) else f"it is {_OTHER[word]}"
            count = f"{len(others)} of {len(self._names)} devices"
            return f"not {word}: {count}, the first is {self._names[index]}: {why}"
        boundaries = sorted({_boundary(energy) for energy in fitting})
        if len(boundaries) > 1:
            return f"devices were {word} at different boundaries: {', '.join(boundaries)}"
        return _sum([_one(energy) for energy in fitting])


def _boundary(energy: MeasuredByPhase | ModelledByPhase) -> Boundary:
    return energy.origin.boundary if isinstance(energy, MeasuredByPhase) else energy.boundary


def _one(energy: MeasuredByPhase | ModelledByPhase) -> Total:
    if isinstance(energy, MeasuredByPhase):
        net_j = None
        if energy.idle_w is not None:
            net_j = energy.energy_j - energy.idle_w * energy.window_s
        low_j = max(0.0, energy.energy_j - energy.uncertainty_j)
        high_j = energy.energy_j + energy.uncertainty_j
        phases = {phase: getattr(energy, f"{phase}_energy_j") for phase in PHASES}
        return Total(energy.energy_j, low_j, high_j, net_j, phases, energy.origin.boundary)
    phases = {phase: getattr(energy, f"{phase}_modelled_j") for phase in PHASES}
    low_j, high_j = energy.modelled_low_j, energy.modelled_high_j
    return Total(energy.modelled_j, low_j, high_j, None, phases, energy.boundary)


def _sum(totals: list[Total]) -> Total:
    """Bounds are added as they are: meters of one make err in one direction."""
    nets = [total.net_j for total in totals if total.net_j is not None]
    return Total(
        sum(total.joules for total in totals),
        sum(total.low_j for total in totals),
        sum(total.high_j for total in totals),
        sum(nets) if len(nets) == len(totals) else None,
        {phase: sum(total.by_phase[phase] for total in totals) for phase in PHASES},
        totals[0].boundary,
    )


class Work(NamedTuple):
    """What a run's energy bought."""

    rounds: int
    samples: int  # that devices computed on, over all rounds
    target_round: int | None  # the first that reached the target accuracy, and why there is none
    target_reason: str


def energy_fields(energies: Energies, work: Work, so_far: Sequence[SoFar]) -> dict[str, Any]:
    """The summary's fields of energy; `so_far` are the joules as they stood at each round's end."""
    fields: dict[str, Any] = {}
    for word, total in (("measured", energies.measured()), ("modelled", energies.modelled())):
        known = total if isinstance(total, Total) else None
        name = f"{word}_energy"
        fields |= {
            f"{name}_j": known.joules if known else None,
            f"{name}_reason": word if known else total,
            f"{name}_low_j": known.low_j if known else None,
            f"{name}_high_j": known.high_j if known else None,
            f"{name}_boundary": known.boundary if known else None,
            f"{name}_by_phase_j": known.by_phase if known else None,
            f"{name}_per_round_j": known.joules / max(1, work.rounds) if known else None,
            f"{name}_per_sample_j": known.joules / max(1, work.samples) if known else None,
        }
        fields |= _to_target(name, known, total, work, [getattr(row, word) for row in so_far])
    measured = energies.measured()
    fields["measured_energy_net_j"] = measured.net_j if isinstance(measured, Total) else None
    return fields


def _to_target(
    name: str, known: Total | None, total: Total | str, work: Work, so_far: list[float | None]
) -> dict[str, Any]:
    """Reports of a round come after its row: the first later row has them that knows all devices.

    Or the total. So it is an upper bound, of a round's joules too many in most runs.
    """
    joules, reason = None, str(total) if known is None else work.target_reason
    if known is not None and work.target_round is not None:
        later = (value for value in so_far[work.target_round + 1 :] if value is not None)
        joules = next(later, known.joules)
    return {f"{name}_to_target_j": joules, f"{name}_to_target_reason": reason}


def spent(before: RunEnergy | None, now: RunEnergy) -> dict[str, Any]:
    """Between two reports of a session: mean watts, and joules by phase; empty when unknown.

    `before` is None at a session's first report. A measured difference needs readings: where a gap
    exceeds a tenth of the time between, as with rounds too short for the meter, there is none.
    """
    if isinstance(now, NoEnergy) or isinstance(before, NoEnergy):
        return {}
    if before is not None and type(before) is not type(now):
        return {}
    later, earlier = _one(now), before
    first = None if earlier is None else _one(earlier)
    window_s = now.window_s - (0.0 if earlier is None else earlier.window_s)
    joules = later.joules - (0.0 if first is None else first.joules)
    word = "measured" if isinstance(now, MeasuredByPhase) else "modelled"
    if window_s <= 0 or (isinstance(now, MeasuredByPhase) and now.gap_s > _GAP_LIMIT * window_s):
        return {}
    phases = {
        f"{phase}_{word}_j": value - (0.0 if first is None else first.by_phase[phase])
        for phase, value in later.by_phase.items()
    }
    return {f"{word}_w": joules / window_s, f"{word}_j": joules, **phases}
