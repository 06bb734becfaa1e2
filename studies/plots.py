"""The plots of a study: accuracy against what it costs, a file a setting; figures over a field."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from studies.cells import Point
from studies.definition import Figure as Wanted
from studies.definition import StudyFile
from studies.figures import by_seed, joules
from studies.matrix import Matrix
from studies.runner import Entry

_COLUMNS: Final = 3
Measure = Callable[[Point], float | None]


def write_plots(folder: Path, matrix: Matrix, entries: Sequence[Entry]) -> list[Path]:
    """Write FOLDER/curves-SETTING.png and FOLDER/figure-N-SETTING.png.

    Axes of which nothing was measured are left out.
    """
    paths = []
    for setting in matrix.settings:
        mine = [entry for entry in entries if entry.setting is setting and entry.results]
        if not mine:
            continue
        name = re.sub(r"[^A-Za-z0-9]+", "-", setting.name).strip("-").lower()
        paths.append(_curves(folder / f"curves-{name}.png", setting.name, matrix, mine))
        for number, wanted in enumerate(matrix.study.figure, 1):
            path = folder / f"figure-{number}-{name}.png"
            draw = _cuts if wanted.y == "cut" else _figure
            paths.append(draw(path, setting.name, wanted, matrix, mine))
    return paths


def _axes_of_cost(matrix: Matrix) -> dict[str, Measure]:
    energy = matrix.study.energy
    return {
        "rounds": lambda point: point.round,
        "simulated seconds": lambda point: point.simulated_s or None,  # 0: nothing takes time
        "MB, both ways, all devices": lambda point: (
            None
            if point.bytes_up is None or point.bytes_down is None
            else (point.bytes_up + point.bytes_down) / 1e6
        ),
        "client forwards, all devices": lambda point: point.client_forwards,
        "modelled J, all devices": lambda point: joules(point, energy),
    }


def _curves(path: Path, title: str, matrix: Matrix, entries: Sequence[Entry]) -> Path:
    measures = {
        label: measure
        for label, measure in _axes_of_cost(matrix).items()
        if any(_curve(entry, measure) for entry in entries)
    }
    columns = min(_COLUMNS, len(measures) or 1)
    rows = -(-len(measures) // columns) or 1
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 0.3 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (label, measure) in zip(panels, measures.items(), strict=False):
        # The usual ten colours repeat too soon.
        panel.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
        for entry in entries:
            _draw(panel, entry, measure)
        panel.set(xlabel=label, ylabel="test accuracy (%)")
        panel.grid(alpha=0.3)
        if label != "rounds":
            panel.set_xscale("log")
        for target in matrix.study.study.targets:
            panel.axhline(100 * target, color="grey", linewidth=0.8, linestyle=":")
    for panel in panels[len(measures) :]:
        panel.set_visible(False)
    figure.suptitle(f"{matrix.study.study.title}: {title}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _draw(panel: Axes, entry: Entry, measure: Measure) -> None:
    curve = _curve(entry, measure)
    style = "--" if entry.row.control_of else "-"
    xs = [x for x, _ in curve]
    lines = panel.plot(
        xs, [100 * statistics.mean(ys) for _, ys in curve], style, label=entry.row.name
    )
    if len(entry.results) > 1:
        low, high = ([100 * pick(ys) for _, ys in curve] for pick in (min, max))
        panel.fill_between(xs, low, high, color=lines[0].get_color(), alpha=0.15, linewidth=0)


def _curve(entry: Entry, measure: Measure) -> list[tuple[float, list[float]]]:
    """Mean cost and the seeds' accuracies, at the rounds that all of them have."""
    seeds = [{p.round: p for p in result.points} for result in entry.results.values()]
    shared = sorted(set.intersection(*(set(points) for points in seeds))) if seeds else []
    curve = []
    for number in shared:
        points = [points[number] for points in seeds]
        costs = [cost for cost in map(measure, points) if cost is not None]
        if len(costs) == len(points):
            curve.append((statistics.mean(costs), [p.accuracy for p in points]))
    return curve


def _figure(
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
    axes.set_xscale("log", base=2)
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
    for entry in entries:
        x = entry.row.values.get(wanted.x)
        if not isinstance(x, int | float) or not entry.results:
            continue
        values = [figures[key] for figures in by_seed(entry, study).values()]
        found = [scale * float(value) for value in values if value is not None]
        unscored = any(not result.points for result in entry.results.values())
        if len(found) == len(values) or unscored:
            name = _series(entry, wanted)
            series.setdefault(name, []).append((float(x), [] if unscored else found))
    return series


def _cuts(path: Path, title: str, wanted: Wanted, matrix: Matrix, entries: Sequence[Entry]) -> Path:
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
    axes.plot(xs, [math.sqrt(parameters / x) for x in xs], "--", label="sqrt(d / tau)")
    axes.plot(xs, [parameters / math.sqrt(x) for x in xs], ":", label="d / sqrt(tau)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel=wanted.x, ylabel="d_c", title=f"{matrix.study.study.title}: {title}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _series(entry: Entry, wanted: Wanted) -> str:
    if wanted.series:
        return f"{wanted.series} {entry.row.fields.get(wanted.series, '')}"
    return "frozen client" if entry.row.control_of else "learning client"
