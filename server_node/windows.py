"""Cutting rows of sensor readings into windows, and choosing the test set among them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.errors import DataError
from server_node.samples import TEST_FRACTION, Draw, seeded_order

SPLITS: Final = {"train": 0, "test": 1}


class Rows(NamedTuple):
    """The file, column by column."""

    values: NDArray[np.float32]  # (rows, channels)
    labels: NDArray[np.int64]  # class numbers
    groups: NDArray[np.int64]  # numbers of the recordings, by first appearance
    splits: NDArray[np.int64]  # of SPLITS
    class_names: tuple[str, ...]


class Windows(NamedTuple):
    """Windows of one label each: first rows in file order, and what was left out."""

    starts: NDArray[np.int64]
    mixed: int
    unused_rows: int


def cut(rows: Rows, window: int, stride: int) -> Windows:
    """Windows within each run of rows of one recording and split; mixed labels are left out."""
    count = len(rows.labels)
    breaks = np.flatnonzero((np.diff(rows.groups) != 0) | (np.diff(rows.splits) != 0)) + 1
    bounds = [0, *breaks.tolist(), count]
    pieces = [
        np.arange(first, end - window + 1, stride) for first, end in itertools.pairwise(bounds)
    ]
    starts = np.concatenate(pieces).astype(np.int64)
    changes = np.concatenate([[0], np.cumsum(np.diff(rows.labels) != 0)])
    pure = starts[changes[starts] == changes[starts + window - 1]]
    ends = np.zeros(count + 1, np.int64)
    np.add.at(ends, starts, 1)
    np.add.at(ends, starts + window, -1)
    return Windows(pure, len(starts) - len(pure), int((np.cumsum(ends[:-1]) == 0).sum()))


def choose_test(
    rows: Rows, starts: NDArray[np.int64], window: int, path: Path, *, by_column: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], str]:
    """Which windows are the test set, which must be left out beside it, and how that came.

    Raises DataError naming `path`.
    """
    dropped = np.zeros(len(starts), bool)
    if by_column:
        test, how = rows.splits[starts] == SPLITS["test"], "by the column split"
    elif (test := _whole_recordings(rows, starts)).any():
        how = "whole recordings, always the same"
    else:
        test, dropped = _latest(rows, starts, window)
        how = "the latest fifth of each class"
    train = ~test & ~dropped
    if not test.any() or not train.any():
        side = "training" if test.any() else "test"
        raise DataError(
            f"{path}: no window is left for the {side} set; use a smaller data.window, more "
            "recordings, or a column split that says train or test"
        )
    labels = rows.labels[starts]
    unseen = np.setdiff1d(labels[test], labels[train])
    if len(unseen):
        name = rows.class_names[unseen[0]] if rows.class_names else unseen[0]
        raise DataError(f"{path}: label {name!s} occurs in the test set alone; train it too")
    return test, dropped, how


def _whole_recordings(rows: Rows, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Recordings in a seeded order, up to a fifth of the windows; if all exceed it, the smallest.

    One that holds the last of a class's training windows stays in the training set.
    """
    _, labels = np.unique(rows.labels[starts], return_inverse=True)
    left = np.bincount(labels)
    test = np.zeros(len(starts), bool)
    recordings, held = _members(rows.groups[starts]), 0
    order = seeded_order(Draw.RECORDINGS, len(recordings)).tolist()
    smallest_first = sorted(order, key=lambda number: len(recordings[number]))
    for attempt, number in enumerate([*order, *smallest_first]):
        members, last_resort = recordings[number], attempt >= len(order)
        if last_resort and held:
            break
        classes, counts = np.unique(labels[members], return_counts=True)
        fits = last_resort or held + len(members) <= len(starts) * TEST_FRACTION
        if fits and (left[classes] > counts).all():
            test[members] = True
            left[classes] -= counts
            held += len(members)
    return test


def _members(codes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Positions (ascending) of each value that occurs in codes (n,)."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)


def _latest(
    rows: Rows, starts: NDArray[np.int64], window: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The last fifth of each class's windows, and the earlier ones that share rows with them.

    A class of which nothing would be left to train on stays in the training set.
    """
    test, dropped = np.zeros(len(starts), bool), np.zeros(len(starts), bool)
    for members in _members(rows.labels[starts]):
        held = max(1, round(len(members) * TEST_FRACTION))
        earlier, last = members[:-held], members[-held:]
        shared = starts[earlier] + window > starts[last[0]]
        if not shared.all():
            test[last] = True
            dropped[earlier] = shared
    return test, dropped
