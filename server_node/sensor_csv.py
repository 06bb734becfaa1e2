"""A CSV of sensor readings, cut into windows: rows are time steps, columns are channels.

The first line names the columns. One column holds the label; `split` (train or test) and a column
that names the recording are optional. A sample is (channels, window) float32.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from server_node.samples import Dataset
from server_node.sections import DataSection
from server_node.windows import SPLITS, Rows, Windows, choose_test, cut

_SPLIT: Final = "split"
# Characters: thousands of columns fit; a file without line ends does not fill the memory.
_MAX_LINE: Final = 1 << 20
# Digits of a label that is a class number; longer ones are names.
_MAX_DIGITS: Final = 9
_NAMED: Final = 8


class _Columns(NamedTuple):
    """Where things stand in a row; -1: the file has no such column."""

    width: int
    channels: dict[str, int]
    label: int
    group: int
    split: int


def read_sensor_csv(path: Path, section: DataSection) -> Dataset:
    """Read and cut as data.window, stride, label and group say. Raises DataError with the line."""
    if not section.window:
        raise DataError(
            f"{path}: data.window is missing: how many rows a window has, e.g. --set data.window=64"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns, rows = _read(file, path, section)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    window, stride = section.window, section.stride or section.window
    windows = cut(rows, window, stride)
    if not len(windows.starts):
        raise DataError(
            f"{path}: no {window} rows in a row have one label (and one recording); "
            "use a smaller data.window"
        )
    test, dropped, how = choose_test(
        rows, windows.starts, window, path, by_column=columns.split >= 0
    )
    train = windows.starts[~test & ~dropped]
    try:
        # A view of every window; indexing it copies the chosen ones alone.
        view = np.lib.stride_tricks.sliding_window_view(rows.values, window, axis=0)
        x_train, x_test = view[train], view[windows.starts[test]]
    except MemoryError as error:
        raise DataError(f"{path}: {error}; use a larger data.stride") from error
    notes = _notes(columns, windows, window, stride, len(x_train), len(x_test), how)
    if dropped.any():
        notes.append(f"{dropped.sum()} training windows that share rows with the test set dropped")
    return Dataset(
        str(path), [x_train], rows.labels[train], [x_test], rows.labels[windows.starts[test]],
        rows.class_names, tuple(notes),
    )  # fmt: skip


def _read(file: IO[str], path: Path, section: DataSection) -> tuple[_Columns, Rows]:
    reader = csv.reader(_lines(file, path), strict=True)
    try:
        columns = _header(next(reader, []), path, section)
        table = _Table(columns)
        for row in reader:
            if row:
                table.add(row, f"{path}:{reader.line_num}", reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error
    return columns, table.rows(path)


class _Table:
    """Collects rows, compactly: numbers as float32, texts as numbers by first appearance."""

    def __init__(self, columns: _Columns) -> None:
        self._columns = columns
        self._places = list(columns.channels.values())
        self._values, self._lines = array("f"), array("Q")
        self._labels: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._label_codes, self._group_codes, self._splits = array("q"), array("q"), array("q")

    def add(self, row: list[str], where: str, line: int) -> None:
        """Take a row. Raises DataError."""
        columns = self._columns
        if len(row) != columns.width:
            raise DataError(f"{where}: {len(row)} fields, the first line has {columns.width}")
        try:
            self._values.extend([float(row[place]) for place in self._places])
        except ValueError as error:
            raise DataError(f"{where}: {_bad_number(row, columns)}") from error
        label = row[columns.label].strip()
        group = row[columns.group] if columns.group >= 0 else ""
        split = row[columns.split].strip() if columns.split >= 0 else "train"
        if not label:
            raise DataError(f"{where}: no label; give it one, or remove the row")
        if split not in SPLITS:
            raise DataError(f"{where}: column 'split' is {split[:40]!r}, neither train nor test")
        self._label_codes.append(self._labels.setdefault(label, len(self._labels)))
        self._group_codes.append(self._groups.setdefault(group, len(self._groups)))
        self._splits.append(SPLITS[split])
        self._lines.append(line)

    def rows(self, path: Path) -> Rows:
        """All of them. Raises DataError when there are none, or a number is not finite."""
        if not self._lines:
            raise DataError(f"{path}: no rows below the first line")
        values = np.frombuffer(self._values, np.float32).reshape(-1, len(self._places))
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            row, column = wrong[0]
            raise DataError(
                f"{path}:{self._lines[row]}: column {[*self._columns.channels][column]!r} is not "
                "a finite number that float32 holds; correct it or remove the row"
            )
        numbers, names = _class_numbers(list(self._labels))
        labels, groups, splits = (
            np.array(codes, np.int64)
            for codes in (self._label_codes, self._group_codes, self._splits)
        )
        return Rows(values, numbers[labels], groups, splits, names)


def _lines(file: IO[str], path: Path) -> Iterator[str]:
    number = 0
    try:
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise DataError(f"{path}:{number}: longer than {_MAX_LINE} characters; not a CSV")
            yield line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: after line {number}: not UTF-8 ({error.reason}); save it as CSV UTF-8"
        ) from error


def _header(names: list[str], path: Path, section: DataSection) -> _Columns:
    names = [name.strip() for name in names]
    if not any(names):
        raise DataError(f"{path}: empty; the first line names the columns")
    listed = _some([repr(name) for name in names])
    for number, name in enumerate(names, 1):
        if not name or names.count(name) > 1:
            what = f"is called {name!r} as another one" if name else "has no name"
            raise DataError(f"{path}:1: column {number} {what}; name it or remove it")
    for field, name in (("data.label", section.label), ("data.group", section.group)):
        if name not in names and (name or field == "data.label"):
            hint = "; columns are separated by commas" if len(names) == 1 else ""
            raise DataError(f"{path}:1: no column {name!r} ({field}) among {listed}{hint}")
    place = {name: number for number, name in enumerate(names)}
    label, group = place[section.label], place.get(section.group, -1)
    split = place.get(_SPLIT, -1)
    channels = {name: n for name, n in place.items() if n not in (label, group, split)}
    if not channels:
        raise DataError(f"{path}:1: no column is left for a channel among {listed}")
    return _Columns(len(names), channels, label, group, split)


def _bad_number(row: list[str], columns: _Columns) -> str:
    for name, place in columns.channels.items():
        try:
            float(row[place])
        except ValueError:
            shown = repr(row[place][:40]) if row[place].strip() else "empty"
            return (
                f"column {name!r} is {shown}, not a number; every column but the label, split and "
                "data.group is a channel: remove it, or set data.group to it"
            )
    raise AssertionError("some column was no number")


def _class_numbers(labels: list[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Class number of each label, and the names by number; labels 0, 1, .. are the numbers."""
    if all(s.isascii() and s.isdecimal() and len(s) <= _MAX_DIGITS for s in labels):
        return np.array([int(label) for label in labels], np.int64), ()
    names = sorted(labels)
    ranks = {name: rank for rank, name in enumerate(names)}
    return np.array([ranks[label] for label in labels], np.int64), tuple(names)


def _notes(
    columns: _Columns, windows: Windows, window: int, stride: int, train: int, test: int, how: str
) -> list[str]:
    made = f"{train} training and {test} test windows ({how}) of {window} rows, one every {stride}"
    notes = [f"{made}; channels {_some(list(columns.channels))}"]
    if windows.mixed:
        notes.append(f"{windows.mixed} windows with more than one label dropped")
    if windows.unused_rows:
        notes.append(f"{windows.unused_rows} rows at the ends of recordings are in no window")
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", .." if len(names) > _NAMED else "")
