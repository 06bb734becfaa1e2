"""The plots of a study: accuracy against what it costs, a file a setting; its figures."""

from __future__ import annotations

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
from studies.field_plots import draw_cuts, draw_over_field
from studies.figures import joules
from studies.matrix import Matrix
from studies.runner import Entry

_COLUMNS: Final = 3
Measure = Callable[[Point], float | None]


def write_plots(folder: Path, matrix: Matrix, entries: Sequence[Entry]) -> list[Path]:
    """Write FOLDER/curves-SETTING.png and FOLDER/figure-N-SETTING.png.

    Axes of which nothing was measured are left out.
    """
    paths = []
    names = _file_names([setting.name for setting in matrix.study.setting])
    for setting in matrix.settings:
        mine = [entry for entry in entries if entry.setting is setting and entry.results]
        if not mine:
            continue
        name = names[setting.name]
        paths.append(_curves(folder / f"curves-{name}.png", setting.name, matrix, mine))
        for number, wanted in enumerate(matrix.study.figure, 1):
            path = folder / f"figure-{number}-{name}.png"
            draw = draw_cuts if wanted.y == "cut" else draw_over_field
            paths.append(draw(path, setting.name, wanted, matrix, mine))
    return paths


def _file_names(settings: Sequence[str]) -> dict[str, str]:
    """A part of a file's name for each setting; its number where letters do not tell it apart."""
    names: dict[str, str] = {}
    for number, setting in enumerate(settings, 1):
        name = re.sub(r"[^A-Za-z0-9]+", "-", setting).strip("-").lower()
        names[setting] = name if name and name not in names.values() else f"{name}-{number}"
    return names


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
    lone = len(xs) == 1  # a line of one point is none
    lines = panel.plot(
        xs, [100 * statistics.mean(ys) for _, ys in curve], style, marker="o" if lone else "",
        label=entry.row.name,
    )  # fmt: skip
    if len(entry.results) > 1:
        colour = lines[0].get_color()
        low, high = ([100 * pick(ys) for _, ys in curve] for pick in (min, max))
        panel.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        if lone:
            panel.vlines(xs, low, high, color=colour, alpha=0.5)


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
