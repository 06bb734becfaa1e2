"""What a study's runs come to: figures of one run, spreads over seeds, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from studies.cells import Point, Result, Spec
from studies.definition import Energy, StudyFile
from studies.runner import Entry
from studies.tuning import rounds_to, seconds_to


class Spread(NamedTuple):
    """Of values by seed: mean, sample deviation (None below two values), extremes, count."""

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """None when a value is missing, or all are."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.mean(known), std, min(known), max(known), len(known))


def joules(point: Point, energy: Energy | None) -> float | None:
    """The linear model: forwards and bytes, each at its price; None without prices or counts."""
    counted = (point.client_forwards, point.bytes_up, point.bytes_down)
    if energy is None or None in counted:
        return None
    forwards, up, down = (float(value or 0) for value in counted)
    return forwards * energy.joules_per_forward + (up + down) * energy.joules_per_byte


def run_figures(result: Result, spec: Spec, study: StudyFile) -> dict[str, Any]:
    """One run's figures by name; None: not reached, or not measured."""
    last = result.points[-1] if result.points else None
    figures: dict[str, Any] = {
        "outcome": result.outcome,
        "accuracy": last.accuracy if last else None,
        "loss": last.loss if last else None,
        "rounds": last.round if last else 0,
        "simulated_s": last.simulated_s if last else None,
        "client_changed": result.client_changed,
        "config_sha256": spec.digest,
    }
    clients = result.client_rounds or None
    for name in ("bytes_up", "bytes_down", "client_forwards"):
        total = getattr(last, name) if last else None
        per_round = total / clients if clients and total is not None else None
        figures[f"{name}_per_client_round"] = per_round
    batch = spec.config.devices.batch
    figures["data_passes"] = clients * batch / result.train_samples if clients else None
    figures["modelled_j"] = joules(last, study.energy) if last else None
    for target in study.study.targets:
        figures[f"rounds_to_{target:g}"] = rounds_to(result.points, target)
        figures[f"seconds_to_{target:g}"] = seconds_to(result.points, target)
    for at_s in study.study.at_s:
        seen = [p.accuracy for p in result.points if (p.simulated_s or math.inf) <= at_s]
        figures[f"accuracy_at_{at_s:g}_s"] = seen[-1] if seen else None
    return figures


def by_seed(entry: Entry, study: StudyFile) -> dict[int, dict[str, Any]]:
    """The figures of a row's test runs."""
    return {
        seed: run_figures(result, entry.specs[seed], study)
        for seed, result in sorted(entry.results.items())
    }


def gains(entry: Entry, control: Entry | None) -> Spread | None:
    """What the learning client adds over the frozen one, in accuracy: differences by seed."""
    if control is None:
        return None
    both = sorted(set(entry.results) & set(control.results))
    return spread([_accuracy(entry.results[s], control.results[s]) for s in both])


def control_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The frozen-client row that stands beside a row."""
    found = [
        e for e in entries if e.setting is entry.setting and e.row.control_of == entry.row.name
    ]
    return found[0] if found else None


def _accuracy(result: Result, control: Result) -> float | None:
    if not result.points or not control.points:
        return None
    return result.points[-1].accuracy - control.points[-1].accuracy
