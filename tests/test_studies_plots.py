"""The figures of a study: lines that belong together, files that do not overwrite each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from studies.cells import Point, Result
from studies.definition import parse_study
from studies.matrix import Matrix, Options
from studies.plots import write_plots
from studies.runner import Entry, places
from studies.tables import markdown

STUDY = """
[study]
title = "t"
seeds = 1
targets = [0.5]

[base]
method = { server_optimiser = "SGD", tau = 2 }

[[setting]]
name = "A b"

[[setting]]
name = "a-B"

[[setting]]
name = "日本"

[[arm]]
name = "one, K {method.directions_client}"
each = { method.directions_client = [1, 4] }
control = true

[[arm]]
name = "two, K {method.directions_client}"
each = { method.directions_client = [1, 4] }
set = { devices.batch = 8 }

[[figure]]
x = "method.directions_client"
y = "accuracy"
"""


def entries_of(matrix: Matrix) -> list[Entry]:
    """Every row with one point: arms at 90 %, controls at 10 %."""
    entries = []
    for setting, row in places(matrix):
        accuracy = 0.1 if row.control_of else 0.9
        point = Point(10, 1.0, accuracy, 1.0, 1, 1, 1.0, 1)
        result = Result([point], "complete", 1, 100, 10, 90, True, 1.0)
        spec = matrix.spec(setting, row, {}, 0, tuning=False)
        entries.append(Entry(setting, row, {}, [], {0: result}, {0: spec}, []))
    return entries


def drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> tuple[list[Path], dict[str, list[tuple[float, float]]]]:
    """The files, and the lines of the first figure over a field: label -> points."""
    figures: dict[str, Figure] = {}

    def savefig(self: Figure, path: Path, **_: object) -> None:
        figures[path.name] = self
        path.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", savefig)
    matrix = Matrix(parse_study(text, "x"), "x", Options())
    paths = write_plots(tmp_path, matrix, entries_of(matrix))
    (axes,) = figures[next(path.name for path in paths if "figure-1" in path.name)].axes
    lines = {}
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line = container.lines[0]
        xs, ys = line.get_xdata(), line.get_ydata()
        lines[str(container.get_label())] = list(zip(map(float, xs), map(float, ys), strict=True))
    return paths, lines


def test_every_arm_and_control_has_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines = drawn(tmp_path, monkeypatch, STUDY)
    assert lines == {
        "one, K *": [(1, 90), (4, 90)],
        "one, K *, frozen client": [(1, 10), (4, 10)],
        "two, K *": [(1, 90), (4, 90)],
    }


def test_a_series_joins_arms_where_they_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value is that of the configuration, wherever it was set."""
    by_tau = f'{STUDY}series = "method.tau"\n'
    _, lines = drawn(tmp_path, monkeypatch, by_tau)
    assert list(lines) == [
        "method.tau 2, one, K *", "method.tau 2, one, K *, frozen client", "method.tau 2, two, K *",
    ]  # fmt: skip
    apart = by_tau.replace("[1, 4] }\nset", "[8, 16] }\nset")
    _, lines = drawn(tmp_path, monkeypatch, apart)
    assert lines == {
        "method.tau 2": [(1, 90), (4, 90), (8, 90), (16, 90)],
        "method.tau 2, frozen client": [(1, 10), (4, 10)],
    }


def test_curves_of_one_point_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    matrix = Matrix(parse_study(STUDY, "x"), "x", Options())
    write_plots(tmp_path, matrix, entries_of(matrix))
    curves = [line for line in figures[0].axes[0].lines if line.get_label()[0] != "_"]
    assert [list(line.get_xdata()) for line in curves] == [[10]] * 6
    assert {line.get_marker() for line in curves} == {"o"}


def test_settings_of_like_names_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = drawn(tmp_path, monkeypatch, STUDY)
    names = ["a-b", "a-b-2", "-3"]
    kinds = ("curves", "figure-1")
    assert [path.name for path in paths] == [f"{k}-{n}.png" for n in names for k in kinds]


@pytest.mark.parametrize("y", ["accuracy", "cut"])
def test_a_field_may_be_zero(tmp_path: Path, y: str) -> None:
    text = f"""
[study]
title = "t"
seeds = 1
targets = [0.5]
[[setting]]
name = "s"
[[arm]]
name = "{{model.cut}}, clip {{guards.clip}}"
each = {{ model.cut = ["fc1", "fc2"], guards.clip = [0.0, 4.0] }}
[[figure]]
x = "guards.clip"
y = "{y}"
"""
    matrix = Matrix(parse_study(text, "x"), "x", Options())
    paths = write_plots(tmp_path, matrix, entries_of(matrix))
    assert [path.stat().st_size > 1000 for path in paths] == [True, True]


def test_a_table_does_not_tell_of_all_what_holds_for_its_first_row() -> None:
    matrix = Matrix(parse_study(STUDY, "x"), "x", Options())
    (first, *_) = [
        row for row in markdown(matrix, entries_of(matrix), "c").splitlines() if ";" in row
    ]
    assert first.startswith("mlp:64-32-32-10 cut after fc1; ")
    assert "several batch sizes; iid; " in first
