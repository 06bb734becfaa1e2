"""The files of a study: raw.csv with every evaluated point, tuning.csv, summary.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from server_node.files import replace_file
from studies.cells import Result
from studies.figures import by_seed, control_of, gains, joules, spread
from studies.matrix import Matrix
from studies.runner import Entry

RAW_FILE: Final = "raw.csv"
TUNING_FILE: Final = "tuning.csv"
SUMMARY_FILE: Final = "summary.json"
STUDY_FILE: Final = "study.toml"
RAW_COLUMNS: Final = (
    "arm", "setting", "seed", "round", "simulated_s", "accuracy", "loss", "bytes_up", "bytes_down",
    "client_forwards", "server_steps", "modelled_j", "config_sha256",
)  # fmt: skip
TUNING_COLUMNS: Final = (
    "arm", "setting", "trial", "values", "seed", "rounds", "accuracy", "outcome", "chosen",
)  # fmt: skip


def write_report(folder: Path, matrix: Matrix, entries: Sequence[Entry], text: str) -> None:
    """Write all files but the tables and the plots; `text` is the study's TOML."""
    _write(folder / STUDY_FILE, text)
    _write(folder / RAW_FILE, _csv(RAW_COLUMNS, _raw_rows(matrix, entries)))
    if matrix.trials:
        _write(folder / TUNING_FILE, _csv(TUNING_COLUMNS, _tuning_rows(entries)))
    summary = summarise(matrix, entries)
    _write(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def budget(matrix: Matrix) -> dict[str, Any] | None:
    """What every tuned row may spend under every setting; None: nothing is tuned."""
    study, tuning = matrix.study, matrix.study.tuning
    tuned = [
        matrix.config(setting, row, row.trials[0], tuning=True)
        for setting in matrix.settings
        for row in matrix.rows_under(setting)
        if row.trials
    ]
    if tuning is None or not tuned:
        return None
    rounds = sorted({config.run.rounds for config in tuned})
    by = tuning.by if tuning.by == "accuracy" else f"{tuning.by} to {study.study.targets[0]:g}"
    return {
        "trials": matrix.trials,
        "seeds_per_trial": matrix.tuning_seeds,
        "rounds_per_run": rounds[0] if len(rounds) == 1 else rounds,
        "holdout": tuning.holdout,
        "by": by,
    }


def summarise(matrix: Matrix, entries: Sequence[Entry]) -> dict[str, Any]:
    """The study for programs: per row and setting the figures by seed and their spreads."""
    study = matrix.study
    rows = []
    for entry in entries:
        figures = by_seed(entry, study)
        names = next(iter(figures.values()), {})
        numbers = [n for n in names if n not in ("outcome", "config_sha256", "client_changed")]
        spreads = {name: spread([f[name] for f in figures.values()]) for name in numbers}
        gain = gains(entry, control_of(entry, entries))
        rows.append({
            "setting": entry.setting.name, "arm": entry.row.name, "kind": entry.row.kind,
            "control_of": entry.row.control_of or None,
            "tuned": bool(entry.row.trials), "chosen": entry.chosen or None,
            "seeds": figures,
            "spread": {name: s._asdict() if s else None for name, s in spreads.items()},
            "adds_over_frozen": gain._asdict() if gain else None,
            "errors": entry.errors,
        })  # fmt: skip
    return {
        "title": study.study.title,
        "quick": matrix.options.quick,
        "seeds": matrix.seeds,
        "budget": budget(matrix),
        "modelled_j_reason": study.energy.source if study.energy else "the study gives no [energy]",
        "rows": rows,
        "published": msgspec.to_builtins(study.published),
    }


def _raw_rows(matrix: Matrix, entries: Sequence[Entry]) -> Iterable[dict[str, Any]]:
    for entry in entries:
        for seed, result in sorted(entry.results.items()):
            for point in result.points:
                yield {
                    "arm": entry.row.name, "setting": entry.setting.name, "seed": seed,
                    **msgspec.structs.asdict(point),
                    "modelled_j": joules(point, matrix.study.energy),
                    "config_sha256": entry.specs[seed].digest,
                }  # fmt: skip


def _tuning_rows(entries: Sequence[Entry]) -> Iterable[dict[str, Any]]:
    for entry in entries:
        for trial, results in enumerate(entry.tuned):
            values = entry.row.trials[trial]
            for seed, result in enumerate(results):
                yield {
                    "arm": entry.row.name, "setting": entry.setting.name, "trial": trial,
                    "values": json.dumps(values), "seed": seed, **_outcome(result),
                    "chosen": values == entry.chosen,
                }  # fmt: skip


def _outcome(result: Result) -> dict[str, Any]:
    last = result.points[-1] if result.points else None
    return {
        "rounds": last.round if last else 0, "accuracy": last.accuracy if last else None,
        "outcome": result.outcome,
    }  # fmt: skip


def _csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    data = text.encode()
    replace_file(path, lambda file: file.write(data))
