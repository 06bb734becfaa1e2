"""From raw samples to results: a pure function of the evidence, the same bytes on every machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from edge_client.bench.conditions import throttled
from edge_client.bench.evidence import Evidence
from edge_client.bench.records import (
    Cut,
    Kind,
    Latencies,
    Place,
    Window,
    places,
)
from edge_client.bench.results import (
    RESULTS_FORMAT,
    CutResult,
    Figures,
    IterationEnergy,
    Phases,
    Results,
    WindowResult,
)
from edge_client.bench.verdict import faults, notes
from edge_client.errors import EvidenceError, GapError
from edge_client.power.integrate import Trace, integrate
from edge_client.power.model import BoardModel
from wire_protocol.energy import EnergyMeasured, EnergyModelled, NoEnergy

_FLOAT_BYTES: Final = 4
# Written results have so many digits: sums may differ in the last ones between processors.
_DIGITS: Final = 6


class _Taken(NamedTuple):
    """A window that is there."""

    place: Place
    window: Window
    latencies: Latencies
    energy: EnergyMeasured | NoEnergy
    throttled: bool | None


def compute_results(evidence: Evidence) -> Results:
    """Raises EvidenceError when the raw files contradict themselves."""
    cuts = [_cut_result(evidence, number) for number in range(len(evidence.configuration.cuts))]
    reasons = list(faults(evidence, cuts))
    results = Results(
        RESULTS_FORMAT, evidence.digest, not reasons, reasons, list(notes(evidence, cuts)),
        evidence.configuration, evidence.environments, cuts,
    )  # fmt: skip
    return msgspec.convert(_rounded(msgspec.to_builtins(results)), Results)


def _cut_result(evidence: Evidence, number: int) -> CutResult:
    configuration = evidence.configuration
    cut: Cut = configuration.cuts[number]
    here = [p for p in places(configuration) if p.cut == number and evidence.done(p)]
    taken = [_taken(evidence, place) for place in here]
    idles_w = [
        t.energy.energy_j / t.energy.window_s
        for t in taken
        if t.place.kind == "idle" and isinstance(t.energy, EnergyMeasured)
    ]
    idle_w = statistics.fmean(idles_w) if idles_w else None
    steps = _of(taken, "step")
    return CutResult(
        cut.bundle, cut.graph, cut.model, cut.cut, cut.parameters, cut.weights_bytes,
        _FLOAT_BYTES * configuration.batch * math.prod(cut.activation_shape),
        steps[-1].window.frame_bytes if steps else None,
        taken[-1].window.rss_bytes if taken else None,
        max((t.window.peak_rss_bytes for t in taken), default=None),
        idle_w,
        _figures(evidence, _of(taken, "forward"), idle_w),
        _figures(evidence, steps, idle_w),
        [_short(t) for t in taken],
    )  # fmt: skip


def _taken(evidence: Evidence, place: Place) -> _Taken:
    window, latencies = evidence.window(place), evidence.latencies(place)
    if place.kind != "idle" and not (latencies.seconds and window.iterations):
        raise EvidenceError(f"{evidence.folder}: window {place.name} has no iterations")
    try:
        hot = throttled(window.throttle_before, window.throttle_after)
    except ValueError as error:
        raise EvidenceError(f"{evidence.folder}: window {place.name}: {error}") from error
    return _Taken(place, window, latencies, _window_energy(evidence, place, window), hot)


def _window_energy(evidence: Evidence, place: Place, window: Window) -> EnergyMeasured | NoEnergy:
    origin = evidence.environments[0].meter
    power = evidence.power(place)
    if origin is None or power is None:
        return NoEnergy(evidence.environments[0].meter_reason or "performance mode")
    times_s, powers_w = (np.array(column) for column in power)
    trace = Trace(times_s, powers_w, origin, window.power_note or "")
    try:
        return integrate(trace, window.begin_s, window.end_s)
    except GapError as error:
        return NoEnergy(str(error))


def _figures(evidence: Evidence, taken: Sequence[_Taken], idle_w: float | None) -> Figures | None:
    if not taken:
        return None
    medians_s = [statistics.median(t.latencies.seconds) for t in taken]
    mean_s = statistics.median(t.window.seconds / t.window.iterations for t in taken)
    pooled_s = sorted(s for t in taken for s in t.latencies.seconds)
    cores = evidence.environments[0].cores
    utilisation = statistics.median(t.window.cpu_s / t.window.seconds / cores for t in taken)
    return Figures(
        windows=len(taken),
        iterations=sum(t.window.iterations for t in taken),
        median_s=statistics.median(medians_s),
        p90_s=pooled_s[math.ceil(0.9 * len(pooled_s)) - 1],
        mean_s=mean_s,
        spread_relative=_spread(medians_s),
        utilisation=min(1.0, utilisation),
        phases=_phases(taken) if taken[0].place.kind == "step" else None,
        energy=_energy(evidence, taken, idle_w, mean_s),
    )


def _phases(taken: Sequence[_Taken]) -> Phases:
    def median(of: Callable[[Latencies], Iterable[float]]) -> float:
        return statistics.median(statistics.median(of(t.latencies)) for t in taken)

    return Phases(
        perturb_s=median(lambda rows: rows.perturb_s),
        forward_s=median(lambda rows: rows.forward_s),
        encode_s=median(lambda rows: rows.encode_s),
        compute_s=median(lambda rows: map(sum, zip(rows.perturb_s, rows.forward_s, strict=True))),
    )


def _energy(
    evidence: Evidence, taken: Sequence[_Taken], idle_w: float | None, mean_s: float
) -> IterationEnergy | EnergyModelled | NoEnergy:  # fmt: skip
    measured = [(t, t.energy) for t in taken if isinstance(t.energy, EnergyMeasured)]
    if measured:
        return _measured(measured, idle_w)
    if evidence.configuration.mode == "energy":
        reason = taken[0].energy
        assert isinstance(reason, NoEnergy)
        return reason  # a meter was there: its failure is not papered over by a model
    power = evidence.configuration.model_power
    if power is None:
        why = evidence.environments[0].meter_reason or "performance mode: power is not sampled"
        return NoEnergy(
            f"{why}; neither is it modelled: that needs a profile, and another --meter than none"
        )
    return BoardModel(*msgspec.structs.astuple(power)).energy(busy_s=mean_s, idle_s=0.0)


def _measured(
    measured: Sequence[tuple[_Taken, EnergyMeasured]], idle_w: float | None
) -> IterationEnergy:
    joules = [e.energy_j / t.window.iterations for t, e in measured]
    relative = statistics.median(e.uncertainty_j / e.energy_j if e.energy_j else 0.0
                                 for _, e in measured)  # fmt: skip
    energy_j = statistics.median(joules)
    repeated_j = 2 * statistics.stdev(joules) / math.sqrt(len(joules)) if len(joules) > 1 else 0.0
    uncertainty_j = math.hypot(relative * energy_j, repeated_j)
    net_j = net_uncertainty_j = None
    if idle_w is not None:
        idle_j = idle_w * statistics.median(e.window_s / t.window.iterations for t, e in measured)
        net_uncertainty_j = math.hypot(uncertainty_j, relative * idle_j)
        net_j = statistics.median(
            (e.energy_j - idle_w * e.window_s) / t.window.iterations for t, e in measured
        )
    return IterationEnergy(
        energy_j=energy_j,
        net_j=net_j,
        uncertainty_j=uncertainty_j,
        net_uncertainty_j=net_uncertainty_j,
        spread_relative=_spread(joules),
        mean_w=statistics.median(e.energy_j / e.window_s for _, e in measured),
        idle_w=idle_w,
        windows=len(measured),
        fewest_samples=min(e.samples for _, e in measured),
        lowest_rate_hz=min(e.rate_hz for _, e in measured),
        largest_gap_s=max(e.largest_gap_s for _, e in measured),
        origin=measured[0][1].origin,
    )


def _short(t: _Taken) -> WindowResult:
    window, energy = t.window, t.energy
    measured = isinstance(energy, EnergyMeasured)
    return WindowResult(
        t.place.name, window.seconds, window.iterations,
        statistics.median(t.latencies.seconds) if t.latencies.seconds else None,
        energy.energy_j / energy.window_s if isinstance(energy, EnergyMeasured) else None,
        energy.samples if isinstance(energy, EnergyMeasured) else 0,
        window.other_cpu_s / window.seconds,
        None if measured else energy.reason if isinstance(energy, NoEnergy) else None,
        window.temperature_before_c, window.temperature_after_c, window.frequency_after_hz,
        t.throttled,
    )  # fmt: skip


def _of(taken: Iterable[_Taken], kind: Kind) -> list[_Taken]:
    return [t for t in taken if t.place.kind == kind]


def _spread(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _rounded(tree: Any) -> Any:
    if isinstance(tree, float):
        return float(f"{tree:.{_DIGITS}g}")
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return tree
