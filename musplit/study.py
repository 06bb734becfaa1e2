"""`musplit study`, seen from the terminal."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from musplit.support import say
from studies.definition import library, parse_study, study_text
from studies.matrix import Matrix, Options
from studies.plots import write_plots
from studies.report import budget, write_report
from studies.runner import Runner, places
from studies.tables import markdown, write_tables
from studies.view import StudyView


def print_library() -> None:
    """The studies that ship with musplit, a line each."""
    for name, text in library().items():
        print(f"{name:14} {parse_study(text, name).study.title}")


def run_study(study: str, options: Options, out: Path | None, jobs: int | None) -> int:
    """Run a study, write its files, print its tables; 1 when a run failed."""
    name, text = study_text(study)
    matrix = Matrix(parse_study(text, study), study, options)
    folder = out or Path("runs") / f"study-{name}{'-quick' if options.quick else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    command = repeat_command(study, options)
    with StudyView(sys.stderr) as view:
        for line in describe(matrix):
            view.say(line)
        entries = Runner(matrix, folder, jobs or os.cpu_count() or 1, view).run()
    write_report(folder, matrix, entries, text)
    write_tables(folder, matrix, entries, command)
    write_plots(folder, matrix, entries)
    print(markdown(matrix, entries, command))
    say(f"study folder: {folder}")
    failed = [error for entry in entries for error in entry.errors]
    if failed:
        say(f"musplit: error: {len(failed)} runs failed; the same command runs them again")
    return 1 if failed else 0


def print_plan(study: str, options: Options) -> None:
    """What would be run: settings, rows, budget and the number of runs."""
    _, text = study_text(study)
    for line in describe(Matrix(parse_study(text, study), study, options)):
        print(line)


def describe(matrix: Matrix) -> list[str]:
    """The matrix in lines: what is run, and with what budget it is tuned."""
    lines = []
    for setting in matrix.settings:
        lines += [f"{setting.name}:"]
        for row in matrix.rows_under(setting):
            how = f"{len(row.trials)} trials, then " if row.trials else ""
            lines.append(f"  {row.name} ({row.kind}): {how}{matrix.seeds} seeds")
    spent = budget(matrix)
    if spent is not None:
        lines.append(
            f"budget of every tuned row: {spent['trials']} trials x {spent['rounds_per_run']} "
            f"rounds x {spent['seeds_per_trial']} seeds, on {spent['holdout']:g} of the training "
            f"set, best by {spent['by']}"
        )
    trials = sum(len(row.trials) * matrix.tuning_seeds for _, row in places(matrix))
    tests = len(places(matrix)) * matrix.seeds
    lines.append(f"{trials + tests} runs: {trials} of tuning, {tests} on the test set")
    return lines


def repeat_command(study: str, options: Options) -> str:
    """The command line that repeats the study; where the data lie is the reader's business."""
    parts = ["musplit", "study", study]
    parts += ["--data", "DIR"] if options.data else []
    for flag, values in (
        ("--set", options.overrides), ("--setting", options.settings), ("--arm", options.arms)
    ):  # fmt: skip
        parts += [part for value in values for part in (flag, value)]
    parts += ["--seeds", str(options.seeds)] if options.seeds else []
    return shlex.join([*parts, *(["--quick"] if options.quick else [])])
