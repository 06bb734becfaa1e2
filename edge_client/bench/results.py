"""What the raw samples say: a pure function of the evidence, the same bytes on every machine.

Latency is that of one iteration: a forward of a batch, or a whole step. `median_s` is the median
over the windows of each window's median, `p90_s` that of all timed iterations together. Energy is
per iteration, the median over the windows; a joule that was measured and one that was modelled have
fields of different names (wire_protocol/energy.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from edge_client.bench.conditions import throttled
from edge_client.bench.environment import Environment
from edge_client.bench.evidence import Evidence
from edge_client.bench.records import (
    MIN_ITERATIONS,
    MIN_POWER_SAMPLES,
    REPORTABLE_REPEATS,
    REPORTABLE_WINDOW_S,
    Configuration,
    Cut,
    Kind,
    Latencies,
    Place,
    Record,
    Window,
    places,
)
from edge_client.errors import EvidenceError, GapError
from edge_client.power.integrate import Trace, integrate
from edge_client.power.model import BoardModel
from wire_protocol.energy import EnergyMeasured, EnergyModelled, NoEnergy, Origin

RESULTS_FORMAT: Final = "musplit-bench-results/1"
_FLOAT_BYTES: Final = 4
# Written results have so many digits: sums may differ in the last ones between processors.
_DIGITS: Final = 6
_NOTED_SPREAD: Final = 0.1


class IterationEnergy(Record, frozen=True, tag="measured"):
    """Joules of one iteration by a meter: the median over the windows."""

    energy_j: float  # gross
    net_j: float | None  # less the idle power; None: idle was not measured
    # Coverage factor 2: the meter's, and 2 s / sqrt(n) of the n windows, in quadrature.
    uncertainty_j: float
    spread_relative: float  # (highest - lowest) / median over the windows
    mean_w: float
    idle_w: float | None
    windows: int
    fewest_samples: int  # of a window
    lowest_rate_hz: float  # achieved in a window
    largest_gap_s: float
    origin: Origin


class Phases(Record, frozen=True):
    """Seconds of a median step by phase, and `compute_s`, the median without encoding."""

    perturb_s: float
    forward_s: float
    encode_s: float
    compute_s: float


class Figures(Record, frozen=True):
    """Forwards, or steps, of one cut."""

    windows: int
    iterations: int
    median_s: float
    p90_s: float
    mean_s: float  # a window's length by its iterations: the median over the windows
    spread_relative: float  # (highest - lowest) / median of the windows' medians
    utilisation: float  # processor time over time and cores
    phases: Phases | None  # of steps
    energy: IterationEnergy | EnergyModelled | NoEnergy


class WindowResult(Record, frozen=True):
    """One window, short."""

    name: str
    seconds: float
    iterations: int
    median_s: float | None  # None: idle
    mean_w: float | None
    power_samples: int
    reason: str | None  # why its power does not count
    temperature_before_c: float | None
    temperature_after_c: float | None
    frequency_after_hz: float | None
    throttled: bool | None  # None: the machine does not tell


class CutResult(Record, frozen=True):
    """One cut; None where its windows are missing."""

    bundle: str
    model: str
    cut: str
    parameters: int
    weights_bytes: int
    activation_bytes: int  # of a batch, float32
    frame_bytes: int | None  # that one step sends, encoded
    rss_bytes: int | None  # of the measured process in its last window
    peak_rss_bytes: int | None
    idle_w: float | None
    forward: Figures | None
    step: Figures | None
    windows: list[WindowResult]


class Results(Record, frozen=True):
    """results.json."""

    format: str
    evidence_sha256: str
    reportable: bool
    not_reportable: list[str]  # why not
    notes: list[str]
    configuration: Configuration
    environments: list[Environment]
    cuts: list[CutResult]


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
    reasons = list(_not_reportable(evidence, cuts))
    results = Results(
        RESULTS_FORMAT, evidence.digest, not reasons, reasons, list(_notes(evidence, cuts)),
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
        cut.bundle, cut.model, cut.cut, cut.parameters, cut.weights_bytes,
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
        return NoEnergy(f"{why}; and no profile to model it from: give --profile")
    return BoardModel(*msgspec.structs.astuple(power)).energy(busy_s=mean_s, idle_s=0.0)


def _measured(
    measured: Sequence[tuple[_Taken, EnergyMeasured]], idle_w: float | None
) -> IterationEnergy:
    joules = [e.energy_j / t.window.iterations for t, e in measured]
    relative = statistics.median(e.uncertainty_j / e.energy_j if e.energy_j else 0.0
                                 for _, e in measured)  # fmt: skip
    energy_j = statistics.median(joules)
    repeated_j = 2 * statistics.stdev(joules) / math.sqrt(len(joules)) if len(joules) > 1 else 0.0
    net_j = None
    if idle_w is not None:
        net_j = statistics.median(
            (e.energy_j - idle_w * e.window_s) / t.window.iterations for t, e in measured
        )
    return IterationEnergy(
        energy_j=energy_j,
        net_j=net_j,
        uncertainty_j=math.hypot(relative * energy_j, repeated_j),
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
        None if measured else energy.reason if isinstance(energy, NoEnergy) else None,
        window.temperature_before_c, window.temperature_after_c, window.frequency_after_hz,
        t.throttled,
    )  # fmt: skip


def _not_reportable(evidence: Evidence, cuts: Sequence[CutResult]) -> Iterable[str]:
    configuration = evidence.configuration
    if configuration.window_s < REPORTABLE_WINDOW_S:
        yield f"window below {REPORTABLE_WINDOW_S:g} s: --window-s {configuration.window_s:g}"
    if configuration.repeats < REPORTABLE_REPEATS:
        yield f"fewer than {REPORTABLE_REPEATS} repeats: --repeats {configuration.repeats}"
    planned = list(places(configuration))
    windows = [window for cut in cuts for window in cut.windows]
    if len(windows) < len(planned):
        yield f"interrupted: {len(windows)} of {len(planned)} windows are there; --resume goes on"
    hot = [window.name for window in windows if window.throttled]
    if hot:
        yield f"throttled in {_some(hot)}: cool the board, or mend its supply, and repeat"
    few = [w.name for w in windows if w.median_s is not None and w.iterations < MIN_ITERATIONS]
    if few:
        yield f"fewer than {MIN_ITERATIONS} iterations in {_some(few)}"
    if configuration.mode == "energy":
        lost = [window.name for window in windows if window.mean_w is None]
        if lost:
            yield f"no energy in {_some(lost)}: {next(w.reason for w in windows if w.reason)}"
        thin = [
            w.name for w in windows if w.mean_w is not None and w.power_samples < MIN_POWER_SAMPLES
        ]
        if thin:
            yield f"fewer than {MIN_POWER_SAMPLES} power samples in {_some(thin)}"


def _notes(evidence: Evidence, cuts: Sequence[CutResult]) -> Iterable[str]:
    environment = evidence.environments[0]
    windows = [window for cut in cuts for window in cut.windows]
    if evidence.configuration.mode == "performance":
        yield f"energy was not measured: {environment.meter_reason or 'performance mode'}"
    if any(window.throttled is None for window in windows):
        yield "this machine does not tell whether it throttled"
    if any(window.temperature_after_c is None for window in windows):
        yield "this machine does not tell its temperature"
    if environment.load_average > 0.5:
        yield f"the machine was not idle when the bench began: load {environment.load_average:g}"
    if len(evidence.environments) > 1:
        yield f"taken in {len(evidence.environments)} sessions"
    for cut in cuts:
        for kind, figures in (("forward", cut.forward), ("step", cut.step)):
            if figures is not None and figures.spread_relative > _NOTED_SPREAD:
                yield (
                    f"{cut.cut}: the {kind} windows' medians spread by "
                    f"{figures.spread_relative:.0%}"
                )


def _of(taken: Iterable[_Taken], kind: Kind) -> list[_Taken]:
    return [t for t in taken if t.place.kind == kind]


def _spread(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _rounded(tree: Any) -> Any:
    if isinstance(tree, float):
        return float(f"{tree:.{_DIGITS}g}")
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return tree
