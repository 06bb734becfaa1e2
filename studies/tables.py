"""The tables of a study as Markdown: a section to paste, every figure with its spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from server_node.files import replace_file
from studies.definition import Fields, Setting, StudyFile
from studies.figures import Spread, by_seed, control_of, gains, spread
from studies.matrix import Matrix
from studies.report import budget
from studies.runner import Entry

TABLES_FILE: Final = "tables.md"
_NOTHING: Final = "-"
# From here on a deviation is printed; below, the extremes.
_MIN_COUNT_OF_STD: Final = 3


class Column(NamedTuple):
    """A column: its heading, and its text in a row; None: nothing measured."""

    heading: str
    text: Callable[[Entry], str | None]


def write_tables(folder: Path, matrix: Matrix, entries: Sequence[Entry], command: str) -> Path:
    """Write FOLDER/tables.md."""
    path = folder / TABLES_FILE
    data = markdown(matrix, entries, command).encode()
    replace_file(path, lambda file: file.write(data))
    return path


def markdown(matrix: Matrix, entries: Sequence[Entry], command: str) -> str:
    """The study as a section of Markdown; `command` is what repeats it."""
    study = matrix.study.study
    lines = [f"## {study.title}", ""]
    lines += [study.question.strip(), ""] if study.question else []
    lines += [f"    {command}", "", _conditions(matrix), ""]
    if matrix.options.quick:
        lines += ["**A quick run, to see that everything works: these are no results.**", ""]
    for setting in matrix.settings:
        mine = [entry for entry in entries if entry.setting is setting]
        lines += [f"### {setting.name}", "", _fields_of(setting, mine), ""]
        lines += [*_table(matrix, mine, entries), ""]
    lines += _published_alone(matrix)
    errors = [error for entry in entries for error in entry.errors]
    if errors:
        lines += ["Failed:", "", *(f"- {error}" for error in errors), ""]
    return "\n".join(lines).rstrip() + "\n"


def _conditions(matrix: Matrix) -> str:
    seeds = matrix.seeds
    parts = [f"Seeds 0 to {seeds - 1}: mean ± sample deviation." if seeds > 1 else "Seed 0 alone."]
    if 1 < seeds < _MIN_COUNT_OF_STD:
        parts = [f"Seeds 0 to {seeds - 1}: mean and extremes."]
    spent = budget(matrix)
    if spent is None:
        parts.append("Nothing is tuned.")
    else:
        parts.append(
            f"Budget of every tuned row and setting: {spent['trials']} trials of "
            f"{spent['rounds_per_run']} rounds, seeds a trial: {spent['seeds_per_trial']}, on "
            f"{spent['holdout']:g} of the training set held out, best by {spent['by']}."
        )
    energy = matrix.study.energy
    if energy is not None:
        parts.append(
            f"Modelled energy: {energy.joules_per_forward:g} J a client forward, "
            f"{energy.joules_per_byte:g} J a byte ({energy.source})."
        )
    return " ".join(parts)


def _fields_of(setting: Setting, entries: Sequence[Entry]) -> str:
    """What runs under a setting: model, fleet, partition, and the fields it sets."""
    specs = [spec for entry in entries for spec in entry.specs.values()]
    if not specs:
        return "No run."
    configs = [spec.config for spec in specs]
    fields = _values(setting.fields)
    told = (
        _shared("cuts", [f"{c.model.name} cut after {c.model.cut}" for c in configs]),
        _shared(
            "fleets", [f"{c.devices.count} devices, {c.participants} a round" for c in configs]
        ),
        _shared("batch sizes", [f"batch {c.devices.batch}" for c in configs]),
        _shared("partitions", [_partition(c.data.alpha) for c in configs]),
        f"set: {fields}" if fields else "nothing else set",
    )
    return "; ".join(told) + "."


def _shared(what: str, texts: Sequence[str]) -> str:
    """What all have in common, or that they have not."""
    return texts[0] if len(set(texts)) == 1 else f"several {what}"


def _partition(alpha: float) -> str:
    return f"Dirichlet {alpha:g} by label" if alpha else "iid"


def _table(matrix: Matrix, mine: Sequence[Entry], entries: Sequence[Entry]) -> list[str]:
    columns = [*_columns(matrix), *_gain_and_published(matrix, entries)]
    cells = [[column.text(entry) for column in columns] for entry in mine]
    used = [i for i in range(len(columns)) if i < 2 or any(row[i] is not None for row in cells)]
    lines = [
        "| " + " | ".join(columns[i].heading for i in used) + " |",
        "|" + "---|" * len(used),
    ]
    lines += ["| " + " | ".join(row[i] or _NOTHING for i in used) + " |" for row in cells]
    missing = [columns[i].heading for i in range(len(columns)) if i not in used]
    if missing:
        lines += ["", f"Not measured, or not given: {', '.join(missing)}."]
    return lines


def _columns(matrix: Matrix) -> list[Column]:
    study = matrix.study

    def of(name: str, show: Callable[[list[Any]], str | None]) -> Callable[[Entry], str | None]:
        return lambda entry: show([f[name] for f in by_seed(entry, study).values()])

    columns = [
        Column("arm", _name),
        Column("chosen", lambda entry: _values(entry.chosen) or None),
        Column("accuracy, %", of("accuracy", _percent)),
        Column("rounds", of("rounds", lambda v: _plain(v, "{:.0f}"))),
        Column("data passes", of("data_passes", lambda v: _plain(v, "{:.2f}"))),
    ]
    for target in study.study.targets:
        at = f"{100 * target:g} %"
        columns += [
            Column(f"rounds to {at}", of(f"rounds_to_{target:g}", _reached)),
            Column(f"seconds to {at}", partial(_seconds, study, f"seconds_to_{target:g}")),
        ]
    columns += [
        Column(f"accuracy at {s:g} s, %", of(f"accuracy_at_{s:g}_s", _percent))
        for s in study.study.at_s
    ]
    columns += [
        Column(heading, of(f"{name}_per_client_round", lambda v: _plain(v, "{:.0f}")))
        for heading, name in (
            ("bytes up a client-round", "bytes_up"),
            ("bytes down a client-round", "bytes_down"),
            ("client forwards a client-round", "client_forwards"),
        )
    ]
    return [*columns, Column("modelled J", of("modelled_j", lambda v: _plain(v, "{:.3g}")))]


def _gain_and_published(matrix: Matrix, entries: Sequence[Entry]) -> list[Column]:
    known = {(p.setting, p.arm): p for p in matrix.study.published}

    def published(entry: Entry) -> str | None:
        there = known.get((entry.setting.name, entry.row.name))
        return f"{100 * there.accuracy:.2f} ({there.source})" if there else None

    return [
        Column(
            "the learning client adds, points",
            lambda entry: _gain(gains(entry, control_of(entry, entries))),
        ),
        Column("published, %", published),
    ]


def _published_alone(matrix: Matrix) -> list[str]:
    """Published figures that stand beside no row of ours."""
    rows = {(s.name, r.name) for s in matrix.settings for r in matrix.rows_under(s)}
    alone = [p for p in matrix.study.published if (p.setting, p.arm) not in rows]
    if not alone:
        return []
    return [
        "### Published, without a run of ours", "", "| setting | arm | published, % | source |",
        "|---|---|---|---|",
        *(f"| {p.setting} | {p.arm} | {100 * p.accuracy:.2f} | {p.source} |" for p in alone), "",
    ]  # fmt: skip


def _name(entry: Entry) -> str:
    notes = []
    diverged = sum(result.outcome != "complete" for result in entry.results.values())
    if diverged:
        notes.append(f"diverged: {diverged} of {len(entry.results)}")
    if entry.errors:
        notes.append(f"failed: {len(entry.errors)}")
    still = [result.client_changed is False for result in entry.results.values()]
    if any(still) and not entry.row.control_of:
        notes.append("the client half did not change: a frozen client")
    return entry.row.name + (f" ({'; '.join(notes)})" if notes else "")


def _values(fields: Fields) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in fields.items())


def _percent(values: list[float | None]) -> str | None:
    have = spread(values)
    return _spread(have, 100.0, "{:.2f}") if have else None


def _gain(have: Spread | None) -> str | None:
    if have is None:
        return None
    nothing = ": nothing beyond the spread" if have.mean <= (have.std or 0.0) else ""
    return _spread(have, 100.0, "{:+.2f}") + (": nothing" if have.mean <= 0 else nothing)


def _spread(have: Spread, scale: float, form: str) -> str:
    mean, low, high = (form.format(scale * v) for v in (have.mean, have.low, have.high))
    if have.seeds == 1:
        return f"{mean} (n 1)"
    if have.std is None or have.seeds < _MIN_COUNT_OF_STD:
        return f"{mean} ({low} to {high}, n {have.seeds})"
    return f"{mean} ± {scale * have.std:.2f} (n {have.seeds})"


def _plain(values: list[float | None], form: str) -> str | None:
    """The mean; counters hardly differ between seeds, and where they do the extremes follow."""
    have = spread(values)
    if have is None:
        return None
    mean, low, high = (form.format(value) for value in (have.mean, have.low, have.high))
    return mean if low == high else f"{mean} ({low} to {high})"


def _reached(values: list[int | None]) -> str | None:
    have = spread(values)
    if have is None:
        return ", ".join("never" if value is None else str(value) for value in values) or None
    listed = f" ({', '.join(str(value) for value in values)})" if have.seeds > 1 else ""
    return f"{have.mean:.1f}{listed}"


def _seconds(study: StudyFile, name: str, entry: Entry) -> str | None:
    figures = list(by_seed(entry, study).values())
    if not figures or not all(f["simulated_s"] for f in figures):  # 0: nothing takes time
        return None
    values = [f[name] for f in figures]
    have = spread(values)
    if have is None:
        return ", ".join("never" if value is None else f"{value:.1f}" for value in values)
    return _spread(have, 1.0, "{:.1f}")
