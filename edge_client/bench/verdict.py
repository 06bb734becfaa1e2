"""Whether a bench's figures may be reported, and what a reader should know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from edge_client.bench.evidence import Evidence
from edge_client.bench.records import (
    MAX_OTHER_CORES,
    MIN_ITERATIONS,
    MIN_POWER_SAMPLES,
    REPORTABLE_REPEATS,
    REPORTABLE_WINDOW_S,
    places,
)
from edge_client.bench.results import CutResult

_NOTED_SPREAD: Final = 0.1


def faults(evidence: Evidence, cuts: Sequence[CutResult]) -> Iterator[str]:
    """Why the figures are not to be reported; none: they are."""
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
    shared = [window.name for window in windows if window.other_cores > MAX_OTHER_CORES]
    if shared:
        most = max(window.other_cores for window in windows)
        yield f"other programs computed in {_some(shared)}, up to {most:.1f} cores: end them"
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


def notes(evidence: Evidence, cuts: Sequence[CutResult]) -> Iterator[str]:
    """What a reader should know beside them."""
    environment = evidence.environments[0]
    windows = [window for cut in cuts for window in cut.windows]
    if evidence.configuration.mode == "performance":
        yield f"energy was not measured: {environment.meter_reason or 'performance mode'}"
    if any(window.throttled is None for window in windows):
        yield "this machine does not tell whether it throttled"
    if any(window.temperature_after_c is None for window in windows):
        yield "this machine does not tell its temperature"
    if len(evidence.environments) > 1:
        yield f"taken in {len(evidence.environments)} sessions"
    for cut in cuts:
        for kind, figures in (("forward", cut.forward), ("step", cut.step)):
            if figures is not None and figures.spread_relative > _NOTED_SPREAD:
                yield (
                    f"{cut.cut}: the {kind} windows' medians spread by "
                    f"{figures.spread_relative:.0%}"
                )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
