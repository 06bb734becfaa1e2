"""`make bench`: what it prints and writes, on the cheapest of its benchmarks."""

import json
import subprocess
import sys

import pytest
from harness import ROOT


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench", *arguments], cwd=ROOT, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "sub" / "bench.json"
    child = bench("--quick", "--only", "directions", "--out", str(out))
    assert child.returncode == 0, child.stderr
    return child, json.loads(out.read_text())


def test_the_file_says_where_and_on_what_the_figures_were_taken(quick):
    machine = quick[1]["machine"]
    assert set(machine["threads"].values()) == {"1"}
    assert machine["cores"] >= 1
    assert {"numpy", "onnxruntime", "torch", "musplit"} <= set(machine["versions"])


def test_a_ratio_is_that_of_its_raw_repetitions_and_is_held_against_its_limit(quick):
    row = quick[1]["rows"][0]
    assert (row["benchmark"], row["limit"]) == ("directions", 3.0)
    raw = row["raw"]
    assert [len(values) for values in raw.values()] == [1] * len(raw)
    assert row["ratio"] == pytest.approx(raw["generate_and_add_s"][0] / raw["memcpy_s"][0])
    assert row["verdict"] == ("ok" if row["ratio"] <= row["limit"] else "ABOVE")


def test_a_row_without_a_limit_only_informs(quick):
    row = quick[1]["rows"][1]
    assert (row["limit"], row["verdict"]) == (None, "")
    assert row["ratio"] > 0


def test_the_table_shows_every_row_and_progress_goes_to_stderr(quick):
    child, document = quick
    lines = child.stdout.splitlines()
    assert len(lines) == 1 + len(document["rows"])
    for line, row in zip(lines[1:], document["rows"], strict=True):
        assert line.startswith(row["name"])
        assert f"{row['ratio']:.2f}" in line
    assert "directions .." in child.stderr


def test_a_benchmark_that_does_not_exist_is_refused():
    child = bench("--only", "nonsense")
    assert child.returncode == 2
    assert "'nonsense'" in child.stderr.splitlines()[-1]
