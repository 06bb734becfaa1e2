"""A CSV of sensor readings: windows, labels, recordings, the test set, and bad files by line."""

import numpy as np
import pytest

from server_node.config import DataSection
from server_node.datasets import load_dataset
from server_node.errors import DataError


def load(path, text=None, **fields):
    if text is not None:
        path.write_text(text, encoding="utf-8")
    return load_dataset(DataSection(source=str(path), **{"window": 2, **fields}))


def refusal(path, text=None, **fields):
    with pytest.raises(DataError) as caught:
        load(path, text, **fields)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "walks.csv"


def rows(*blocks, head="a,b,label"):
    """(label, count) blocks under a header; a counts rows, b is its negative."""
    lines, n = [head], 0
    for label, count in blocks:
        for _ in range(count):
            lines.append(f"{n},{-n},{label}")
            n += 1
    return "\n".join(lines) + "\n"


SPLIT = "ax,ay,label,split\n" + "".join(
    f"{n},{n / 2},{'run' if n % 8 < 4 else 'walk'},{'train' if n < 16 else 'test'}\n"
    for n in range(24)
)


def test_a_window_is_channels_by_rows_in_order_and_split_says_the_set(path):
    data = load(path, SPLIT)
    assert data.x_train[0].shape == (8, 2, 2)
    assert data.x_train[0].dtype == np.float32
    assert data.x_train[0][1].tolist() == [[2, 3], [1, 1.5]]
    assert data.x_test[0][0].tolist() == [[16, 17], [8, 8.5]]
    assert data.class_names == ("run", "walk")
    assert data.y_train.tolist() == [0, 0, 1, 1] * 2
    assert data.y_test.tolist() == [0, 0, 1, 1]
    made = "8 training and 4 test windows (by the column split) of 2 rows, one every 2"
    assert data.notes == (f"{made}; channels ax, ay",)


def test_stride_is_where_the_next_window_begins(path):
    starts = load(path, SPLIT, stride=1).x_train[0][:, 0, 0].tolist()
    assert starts == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]


def test_windows_of_mixed_labels_are_dropped_and_said_and_so_are_unused_rows(path):
    data = load(path, rows(("x", 7), ("y", 6), ("x", 6), ("y", 6)), window=3)
    # 0 x, 3 x, 6 mixed, 9 y, 12 mixed, 15 x, 18 mixed, 21 y; row 24 is left over
    assert "3 windows with more than one label dropped" in data.notes
    assert "1 rows at the ends of recordings are in no window" in data.notes
    assert sorted([*data.x_train[0][:, 0, 0], *data.x_test[0][:, 0, 0]]) == [0, 3, 9, 15, 21]


def test_integer_labels_are_the_class_numbers(path):
    data = load(path, rows((3, 8), (10, 8)))
    assert set(data.y_train.tolist()) == {3, 10}
    assert data.class_names == ()


def test_other_labels_are_classes_by_sorted_name(path):
    data = load(path, rows(("b", 8), ("10", 8), ("-1", 8)))
    assert data.class_names == ("-1", "10", "b")
    assert data.y_train[0] == 2


def grouped(recordings, count=8):
    lines = ["rec,a,label"]
    for name, label in recordings:
        lines += [f"{name},{number},{label}" for number in range(count)]
    return "\n".join(lines) + "\n"


def test_windows_never_cross_recordings_and_the_test_set_is_whole_recordings(path):
    names = [(f"r{n}", "on" if n % 2 else "off") for n in range(10)]
    lines = grouped(names, count=5).replace(",a,", ",t,")
    data = load(path, lines, group="rec")
    assert len(data.y_train) + len(data.y_test) == 20  # two of each five rows' three possible
    starts = {*data.x_train[0][:, 0, 0].tolist(), *data.x_test[0][:, 0, 0].tolist()}
    assert starts == {0, 2}
    assert len(data.y_test) == 4
    assert "whole recordings" in data.notes[0]
    assert "channels t" in data.notes[0]
    again = load(path, lines, group="rec")
    np.testing.assert_array_equal(data.y_test, again.y_test)


def test_whole_recordings_share_no_value_between_training_and_test(path):
    lines = ["rec,a,label"]
    lines += [f"{n // 12},{n},{(n // 4) % 3}" for n in range(12 * 20)]
    data = load(path, "\n".join(lines), group="rec", stride=1)
    train, test = (set((x[0] // 12).ravel().tolist()) for x in (data.x_train, data.x_test))
    assert not train & test
    assert len(test) == 4


def test_one_recording_a_class_falls_back_to_the_latest_fifth_of_each(path):
    data = load(path, grouped([("r1", "on"), ("r2", "off")], count=20), group="rec")
    assert "the latest fifth of each class" in data.notes[0]
    assert np.bincount(data.y_test).tolist() == [2, 2]
    assert data.x_test[0].min() == 16


def test_overlapping_windows_do_not_leak_into_the_test_set(path):
    data = load(path, rows(("x", 50), ("y", 50)), window=4, stride=1)
    train, test = (set(x[0][:, 0].ravel().tolist()) for x in (data.x_train, data.x_test))
    assert not train & test
    assert any("share rows with the test set" in note for note in data.notes)


def test_columns_may_stand_anywhere_and_the_label_has_a_name_of_choice(path):
    text = "kind,a,b\n" + "".join(f"{n // 10},{n},0\n" for n in range(20))
    data = load(path, text, label="kind")
    assert data.x_train[0].shape == (8, 2, 2)


def test_byte_order_mark_spaces_quotes_blank_lines_and_crlf_are_taken(path):
    plain = load(path, rows((0, 8), (1, 8)))
    odd = '\ufeff"a", b ,label\r\n\r\n' + "".join(f'"{n}", {-n} ,{n // 8}\r\n' for n in range(16))
    path.write_bytes(odd.encode())
    np.testing.assert_array_equal(load(path).x_train[0], plain.x_train[0])


GOOD = rows((0, 8), (1, 8))


@pytest.mark.parametrize(
    ("text", "fields", "says"),
    [
        (GOOD, {"window": 0}, ["data.window is missing", "--set data.window=64"]),
        (GOOD, {"window": 9}, ["smaller data.window"]),
        (GOOD, {"label": "kind"}, ["no column 'kind' (data.label)", "'a', 'b', 'label'"]),
        (GOOD, {"group": "rec"}, ["no column 'rec' (data.group)"]),
        (GOOD.replace("5,-5,", "5,x,"), {}, [".csv:7: column 'b' is 'x', not a number"]),
        (GOOD.replace("5,-5,", "5,,"), {}, [".csv:7: column 'b' is empty"]),
        (GOOD.replace("5,-5,", "5,nan,"), {}, [".csv:7: column 'b' is not a finite"]),
        (GOOD.replace("5,-5,", "inf,1,"), {}, [".csv:7: column 'a' is not a finite"]),
        (GOOD.replace("5,-5,", "1e39,1,"), {}, [".csv:7: column 'a' is not a finite"]),
        (GOOD.replace("5,-5,", "5,"), {}, [".csv:7: 2 fields, the first line has 3"]),
        (GOOD.replace("5,-5,0", "5,-5,0,1"), {}, [".csv:7: 4 fields"]),
        (GOOD.replace("5,-5,0", "5,-5, "), {}, [".csv:7: no label"]),
        (GOOD.replace("5,-5", '"5,-5'), {}, ["not CSV"]),
        (GOOD.replace(",", ";"), {}, ["separated by commas"]),
        (GOOD.replace("a,b", "a,a"), {}, [".csv:1: column 1 is called 'a' as another one"]),
        (GOOD.replace("a,b", ",b"), {}, [".csv:1: column 1 has no name"]),
        ("", {}, ["empty"]),
        ("\n\n", {}, ["empty"]),
        ("a,b,label\n", {}, ["no rows"]),
        ("label\n1\n", {}, ["no column is left for a channel"]),
        (SPLIT.replace("train", "dev"), {}, [".csv:2: column 'split' is 'dev'", "train nor test"]),
        (SPLIT.replace("test", "train"), {}, ["no window is left for the test set"]),
        (SPLIT.replace("train", "test"), {}, ["no window is left for the training set"]),
        (
            SPLIT.replace("16,8.0,run", "16,8.0,sit").replace("17,8.5,run", "17,8.5,sit"),
            {},
            ["label sit occurs in the test set alone"],
        ),
        (rows((0, 2), (1, 2)), {}, ["no window is left for the test set", "column split"]),
        ("a" * (1 << 21), {}, [".csv:1: longer than"]),
        (GOOD + "1," * (1 << 20), {}, [".csv:18: longer than"]),
        (GOOD + '"' + "1" * 200_000 + '",1,1\n', {}, [".csv:18: not CSV"]),
    ],
)
def test_bad_files_are_refused_with_place_and_remedy(path, text, fields, says):
    said = refusal(path, text, **fields)
    assert all(part in said for part in says), said


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_named(path, encoding):
    path.write_bytes(GOOD.replace("\n1,", "\n1é,").encode(encoding))
    assert "UTF-8" in refusal(path)


def test_a_missing_file_is_named(path):
    assert "cannot be read" in refusal(path)


def test_truncated_at_every_byte_it_is_refused_or_shorter_never_a_crash(path):
    outcomes = set()
    for size in range(len(SPLIT)):
        path.write_text(SPLIT[:size])
        try:
            outcomes.add(len(load(path).y_test))
        except DataError:
            outcomes.add("refused")
    assert outcomes == {1, 2, 3, 4, "refused"}


def test_as_many_recordings_and_labels_as_windows_are_taken(path):
    text = "rec,a,label\n" + "".join(f"{n // 2},{n},{n // 4}\n" for n in range(4000))
    data = load(path, text, group="rec")
    assert len(data.y_train) + len(data.y_test) == 2000
    assert len(data.y_test) == 400
