"""The plot of a run: accuracy against rounds and against bytes, with the control in it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from server_node.recorder import RoundMetrics, read_rounds

PLOT_FILE: Final = "accuracy.png"


def plot_run(folder: Path, title: str) -> Path:
    """Write FOLDER/accuracy.png from rounds.jsonl of the run and of its control."""
    # At a run's end: importing it takes a second, which no device should wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    simulated = any(row.simulated_s for row in read_rounds(folder))
    figure = Figure(figsize=(15 if simulated else 10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_round, by_bytes, *by_time = figure.subplots(1, 3 if simulated else 2, sharey=True)
    for name, label, style in (
        ("", "both halves learn", "-"),
        ("control", "frozen client (eta_c = 0)", "--"),
    ):
        rows, accuracy = _evaluated(folder / name)
        by_round.plot([row.round + 1 for row in rows], accuracy, style, label=label)
        megabytes = [((row.bytes_up or 0) + (row.bytes_down or 0)) / 1e6 for row in rows]
        by_bytes.plot(megabytes, accuracy, style)
        for axes in by_time:
            axes.plot([row.simulated_s or 0.0 for row in rows], accuracy, style)
            axes.set(xlabel="simulated seconds")
    by_round.set(xlabel="rounds", ylabel="test accuracy (%)", title=title)
    by_bytes.set(xlabel="MB on the devices' TCP streams, both ways", title="bundle not counted")
    by_bytes.set_xscale("log")
    for axes in (by_round, by_bytes, *by_time):
        axes.grid(alpha=0.3)
    by_round.legend(loc="lower right")
    path = folder / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path


def _evaluated(folder: Path) -> tuple[list[RoundMetrics], list[float]]:
    """The rows that were scored, and their accuracies in percent."""
    rows = [row for row in read_rounds(folder) if row.accuracy is not None]
    return rows, [100 * (row.accuracy or 0.0) for row in rows]
