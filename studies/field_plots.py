"""Figures of a study over a field of its arms: what they come to, or which cut is best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from studies.definition import Figure as Wanted
from studies.definition import StudyFile
from studies.figures import by_seed
from studies.matrix import Matrix
from studies.runner import Entry


def draw_over_field(
    path: Path, title: str, wanted: Wanted, matrix: Matrix, entries: Sequence[Entry]
) -> Path:
    """What the arms of `each` come to against a field: mean and extremes, a line a series.

    A cross at the bottom: what diverged before it was scored.
    """
    study = matrix.study
    target = study.study.targets[0] if study.study.targets else 0.0
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    series = _series_points(wanted, study, target, entries)
    for number, (name, points) in enumerate(series.items()):
        scored = sorted((x, values) for x, values in points if values)
        means = [statistics.mean(values) for _, values in scored]
        spans = [
            [mean - min(values) for mean, (_, values) in zip(means, scored, strict=True)],
            [max(values) - mean for mean, (_, values) in zip(means, scored, strict=True)],
        ]
        axes.errorbar(
            [x for x, _ in scored], means, yerr=spans, marker="o", capsize=3, label=name,
            color=f"C{number}",
        )  # fmt: skip
        lost = [x for x, values in points if not values]
        axes.plot(
            lost, [0.02] * len(lost), f"C{number}x", markersize=9,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    _scale(axes, [x for points in series.values() for x, _ in points])
    unit = "test accuracy (%)" if wanted.y == "accuracy" else f"{wanted.y} to {100 * target:g} %"
    axes.set(xlabel=wanted.x, ylabel=unit, title=f"{study.study.title}: {title}")
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _series_points(
    wanted: Wanted, study: StudyFile, target: float, entries: Sequence[Entry]
) -> dict[str, list[tuple[float, list[float]]]]:
    """By series: x and a value a seed; none where a run diverged before it was scored."""
    key = wanted.y if wanted.y == "accuracy" else f"{wanted.y}_to_{target:g}"
    scale = 100 if wanted.y == "accuracy" else 1
    series: dict[str, list[tuple[float, list[float]]]] = {}
    names = _series_names(wanted, entries)
    for entry, name in zip(entries, names, strict=True):
        x = entry.row.values.get(wanted.x)
        if not isinstance(x, int | float) or not entry.results:
            continue
        values = [figures[key] for figures in by_seed(entry, study).values()]
        found = [scale * float(value) for value in values if value is not None]
        unscored = any(not result.points for result in entry.results.values())
        if len(found) == len(values) or unscored:
            series.setdefault(name, []).append((float(x), [] if unscored else found))
    return series


def draw_cuts(
    path: Path, title: str, wanted: Wanted, matrix: Matrix, entries: Sequence[Entry]
) -> Path:
    """d_c of every pair of cut and x, the best of each x marked, the paper's two rules drawn in.

    The rules are sqrt(d / tau) of the corollaries and d / sqrt(tau) of the prose (arXiv
    2510.21155). Best: fewest rounds to the first target with all seeds, then the mean accuracy.
    """
    targets = matrix.study.study.targets
    places: dict[float, list[tuple[tuple[float, float], int]]] = {}
    parameters = 0
    for entry in entries:
        x = entry.row.values.get(wanted.x)
        first = next(iter(entry.results.values()))
        if not isinstance(x, int | float) or "model.cut" not in entry.row.values:
            continue
        if first.parameters_client is None or first.parameters_server is None:
            continue
        parameters = first.parameters_client + first.parameters_server
        figures = list(by_seed(entry, matrix.study).values())
        rounds = [f[f"rounds_to_{targets[0]:g}"] for f in figures] if targets else []
        cost = math.inf if None in rounds else statistics.mean(rounds or [0])
        accuracy = statistics.mean(f["accuracy"] or 0.0 for f in figures)
        places.setdefault(float(x), []).append(((cost, -accuracy), first.parameters_client))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    xs = sorted(places)
    for x in xs:
        axes.plot([x] * len(places[x]), [d_c for _, d_c in places[x]], "o", color="lightgrey")
    axes.plot(xs, [min(places[x])[1] for x in xs], "o-", label="best cut")
    taus = [x for x in xs if x > 0]
    axes.plot(taus, [math.sqrt(parameters / x) for x in taus], "--", label="sqrt(d / tau)")
    axes.plot(taus, [parameters / math.sqrt(x) for x in taus], ":", label="d / sqrt(tau)")
    _scale(axes, xs)
    axes.set_yscale("log")
    axes.set(xlabel=wanted.x, ylabel="d_c", title=f"{matrix.study.study.title}: {title}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _scale(axes: Axes, xs: Sequence[float]) -> None:
    """Powers of two; linear around zero where a value is there that has no logarithm."""
    if all(x > 0 for x in xs):
        axes.set_xscale("log", base=2)
    else:
        positive = [abs(x) for x in xs if x]
        axes.set_xscale("symlog", base=2, linthresh=min(positive, default=1.0))


def _series_names(wanted: Wanted, entries: Sequence[Entry]) -> list[str]:
    """The line of each entry: the value of the field `series`, or the arm, with * for x.

    Where arms of one value meet at an x, both stand in the name. Frozen clients have their own.
    """
    arms = [_arm_over(wanted.x, entry) for entry in entries]
    if not wanted.series:
        return arms
    values = [f"{wanted.series} {_value(entry, wanted.series)}" for entry in entries]
    places = [(v, e.row.control_of != "", e.row.values.get(wanted.x))
              for v, e in zip(values, entries, strict=True)]  # fmt: skip
    crowded = {place[0] for place in places if places.count(place) > 1}
    return [
        f"{value}, {arm}" if value in crowded
        else f"{value}, frozen client" if entry.row.control_of
        else value
        for value, arm, entry in zip(values, arms, entries, strict=True)
    ]  # fmt: skip


def _arm_over(x: str, entry: Entry) -> str:
    name = entry.row.arm.replace(f"{{{x}}}", "*")
    for field, value in entry.row.values.items():
        name = name.replace(f"{{{field}}}", str(value))
    return f"{name}, frozen client" if entry.row.control_of else name


def _value(entry: Entry, field: str) -> object:
    """What a field is in an entry's runs; of an option that is not set nothing."""
    if field in entry.row.fields:
        return entry.row.fields[field]
    config = next(iter(entry.specs.values())).config
    section, _, name = field.partition(".")
    return getattr(getattr(config, section, None), name, "")
