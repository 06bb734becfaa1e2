"""`musplit study`: resumes, tunes on the validation split alone, writes what it promises."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from core_support import tiny_config
from harness import here

from server_node.config import DataSection
from server_node.datasets import load_dataset
from studies.backends import compute
from studies.cells import Spec
from studies.definition import library, parse_study
from studies.errors import StudyError
from studies.matrix import Matrix, Options
from studies.report import RAW_COLUMNS

STUDY = """
[study]
title = "Tiny"
seeds = 2
targets = [0.2]

[tuning]
trials = 2

[base]
run.rounds = 2
model = { name = "mlp:64-12-10", cut = "fc1" }
devices = { count = 2, batch = 8 }
method = { tau = 1, directions_client = 2 }
evaluation.every = 1

[[setting]]
name = "iid"

[[setting]]
name = "skewed"
set = { data.alpha = 0.5 }

[[arm]]
name = "tuned"
tune = { method.eta_c = [0.1, 0.2], method.eta_s = [0.01, 0.02] }

[[arm]]
name = "as given"
set = { method.tau = 2 }
"""
RAW_HEADER = (
    "arm,setting,seed,round,simulated_s,accuracy,loss,bytes_up,bytes_down,client_forwards,"
    "server_steps,modelled_j,config_sha256"
)


def run(*arguments, code=0):
    """`musplit study`, one worker process; its results do not depend on how many there are."""
    done = here("study", *map(str, arguments), *([] if code else ["--jobs", "1"]))
    assert done.exit_code == code, done.stderr
    return done


def write(path, text=STUDY):
    path.write_text(text, encoding="utf-8")
    return path


def cells(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose runner was killed with -9, one finished file damaged, then run to its end.

    By two worker processes, then by one.
    """
    folder = tmp_path_factory.mktemp("study")
    file, out = write(folder / "tiny.toml"), folder / "out"
    with subprocess.Popen(
        [sys.executable, "-m", "musplit", "study", file, "--out", out, "--jobs", "2"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as runner:  # fmt: skip
        deadline_s = time.monotonic() + 120
        while len(cells(out)) < 3 and runner.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        os.kill(runner.pid, signal.SIGKILL)
    time.sleep(1.0)  # its workers notice
    (out / "work" / "left-behind").mkdir(parents=True, exist_ok=True)
    before = cells(out)
    victim = min(before)
    path = out / "cells" / victim
    path.write_bytes(path.read_bytes().replace(b'"accuracy":', b'"accuracy": 1', 1))
    del before[victim]
    done = run(file, "--out", out)
    return file, out, before, victim, done


def test_what_was_finished_is_not_run_again_and_what_is_damaged_is(study):
    _, out, before, victim, done = study
    after = cells(out)
    assert before
    assert len(after) == 4 + 8
    assert {name: after[name] for name in before} == before
    assert "1 damaged and run again" in done.stderr
    assert "finished before" in done.stderr
    assert not (out / "work").exists()
    assert json.loads((out / "cells" / victim).read_text())["digest"] == victim[:-5]


def test_raw_csv_has_every_evaluated_point(study):
    _, out, *_ = study
    text = (out / "raw.csv").read_text()
    assert text.splitlines()[0] == RAW_HEADER == ",".join(RAW_COLUMNS)
    rows = list(csv.DictReader(text.splitlines()))
    places = [(r["arm"], r["setting"], r["seed"], r["round"]) for r in rows]
    assert places == [
        (arm, setting, seed, number)
        for setting in ("iid", "skewed")
        for arm in ("tuned", "as given")
        for seed in "01"
        for number in "12"
    ]
    for row in rows:
        assert (out / "cells" / f"{row['config_sha256']}.json").is_file()
        assert int(row["bytes_up"]) > 0
        assert float(row["client_forwards"]) == int(row["round"]) * 2 * 5
        assert row["modelled_j"] == ""


def test_every_row_is_tuned_by_the_same_budget_and_it_is_printed(study):
    _, out, _, _, done = study
    assert "budget of every tuned row: 2 trials x 2 rounds x 1 seeds" in done.stderr
    rows = list(csv.DictReader((out / "tuning.csv").read_text().splitlines()))
    assert [(r["setting"], r["trial"], r["rounds"]) for r in rows] == [
        (setting, trial, "2") for setting in ("iid", "skewed") for trial in "01"
    ]
    for setting in ("iid", "skewed"):
        mine = [r for r in rows if r["setting"] == setting]
        best = max(mine, key=lambda r: float(r["accuracy"]))  # the first of equals
        assert [r for r in mine if r["chosen"] == "True"] == [best]


def test_tables_and_summary_have_spread_and_conditions(study):
    _, out, _, _, done = study
    tables = (out / "tables.md").read_text()
    assert tables.rstrip() == done.stdout.rstrip()
    assert "Seeds 0 to 1: mean and extremes." in tables
    assert "n 2)" in tables
    assert "| rounds | data passes |" in tables
    summary = json.loads((out / "summary.json").read_text())
    row = summary["rows"][0]
    scores = [figures["accuracy"] for figures in row["seeds"].values()]
    assert row["spread"]["accuracy"]["mean"] == pytest.approx(np.mean(scores))
    assert row["spread"]["accuracy"]["std"] == pytest.approx(np.std(scores, ddof=1))
    assert summary["budget"]["trials"] == 2
    assert summary["modelled_j_reason"] == "the study gives no [energy]"
    assert all((out / f"curves-{name}.png").stat().st_size > 1000 for name in ("iid", "skewed"))


def test_the_same_study_gives_the_same_bytes(study, tmp_path):
    file, out, *_ = study
    run(file, "--out", tmp_path, "--arm", "as given", "--setting", "iid", "--seeds", "1")
    whole = (out / "raw.csv").read_text().splitlines()
    part = (tmp_path / "raw.csv").read_text().splitlines()
    assert part == [whole[0], *(line for line in whole if line.startswith("as given,iid,0,"))]


def test_tuning_never_sees_the_test_set(tmp_path):
    data = load_dataset(DataSection())
    chosen, raw = [], []
    for name, labels in (("right", data.y_test), ("wrong", (data.y_test + 5) % 10)):
        source = tmp_path / f"{name}.npz"
        np.savez(
            source, x_train=data.x_train[0], y_train=data.y_train, x_test=data.x_test[0],
            y_test=labels,
        )  # fmt: skip
        out = tmp_path / name
        file = write(tmp_path / "tiny.toml")
        run(
            file, "--data", source, "--out", out, "--setting", "iid", "--arm", "tuned",
            "--seeds", "1",
        )  # fmt: skip
        chosen.append((out / "tuning.csv").read_bytes())
        raw.append((out / "raw.csv").read_bytes())
    assert chosen[0] == chosen[1]
    assert raw[0] != raw[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("seeds = 2", "seed = 2"), "study: Object contains unknown field `seed`"),
        (("seeds = 2", "seeds = 0"), "study.seeds"),
        (("[base]", "[bass]"), "unknown field `bass`"),
        (("method.tau = 2", "method.tao = 2"), "'as given' in 'iid': method: Object contains"),
        (("method.tau = 2", "method.tau = 0"), "method.tau"),
        (("trials = 2", "trials = 5"), "a grid of 4 for a budget of 5 trials"),
        (("[tuning]\ntrials = 2", ""), "tune needs a [tuning] table"),
        (('name = "as given"', 'name = "tuned"'), "the name 'tuned' stands twice"),
        (('name = "as given"', 'name = "as given"\nkind = "magic"'), "kind"),
        (("method.tau = 2", "option.eta = 2"), "options are for baselines alone"),
        (('name = "as given"', 'name = "as given"\nkind = "baseline:gus"'), "no baseline 'gus'"),
        (("tau = 1,", "tau = ,"), "not TOML"),
        (("method.tau = 2", "method.eta_s = nan"), "method.eta_s"),
        (("evaluation.every = 1", "evaluation.every = 1\nrun.seed = 7"), "run.seed: every run"),
        (
            ("[[arm]]", '[[figure]]\nx = "method.tau"\ny = "accuracy"\n\n[[arm]]'),
            "figure 1: x: no arm's `each` has 'method.tau'",
        ),
        (
            (
                "set = { method.tau = 2 }",
                (
                    "each = { method.tau = [2] }\n[[figure]]\n"
                    'x = "method.tau"\ny = "accuracy"\nseries = "method.tao"'
                ),
            ),
            "figure 1: series: no field 'method.tao'",
        ),
        (("method.eta_s = [0.01, 0.02]", "run.rounds = [2, 3]"), "tuning.rounds"),
    ],
    ids=str,
)
def test_a_wrong_study_is_refused_in_one_line(change, says):
    text = STUDY.replace(*change)
    assert text != STUDY
    with pytest.raises(StudyError) as caught:
        Matrix(parse_study(text, "my.toml"), "my.toml", Options())
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    assert says in message
    assert "got `str`" not in message
    assert "\n" not in message


def test_runs_do_not_see_what_lies_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "export.py").write_text("raise SystemExit(9)\n")
    file = write(tmp_path / "tiny.toml")
    run(file, "--out", "out", "--setting", "iid", "--arm", "as given", "--seeds", "1")


def test_another_recorded_run_is_another_study(tmp_path):
    recorded = f'\nsimulation = {{ compute = "recorded", recorded = "{tmp_path}" }}'
    text = STUDY.replace("evaluation.every = 1", f"evaluation.every = 1{recorded}")

    def digest(trace):
        (tmp_path / "trace.json").write_text(trace)
        matrix = Matrix(parse_study(text, "x"), "x", Options())
        return matrix.spec(matrix.settings[0], matrix.rows[-1], {}, 0, tuning=False).digest

    assert digest("one") == digest("one") != digest("other times")


def test_what_a_run_cost_is_counted_until_it_was_scored(tmp_path):
    """It went on for rounds that nobody scored, and diverged."""
    config = tiny_config("run.rounds=300", "evaluation.every=300", "method.eta_s=1e4")
    result = compute(Spec("musplit", config, {}, ""), tmp_path, lambda _: None)
    assert (result.outcome, result.points, result.client_rounds) == ("diverged", [], 0)


def test_a_study_that_does_not_exist_ends_with_code_3(tmp_path):
    done = run("nonesuch", "--out", tmp_path, code=3)
    assert done.stderr.count("\n") == 1
    assert "table1" in done.stderr


def test_a_control_is_tuned_by_the_same_budget():
    arm = '[[arm]]\nname = "tuned"'
    text = STUDY.replace(
        arm, f"{arm}\ncontrol = true\ncontrol_tune = {{ method.eta_s = [0.01, 0.02, 0.04] }}"
    )
    matrix = Matrix(parse_study(text, "x"), "x", Options())
    tuned, frozen, given = matrix.rows
    assert len(tuned.trials) == len(frozen.trials) == 2
    assert (frozen.control_of, frozen.fields["method.eta_c"]) == ("tuned", 0.0)
    assert given.trials == ()
    with pytest.raises(StudyError, match="a grid of 1 for a budget of 2"):
        Matrix(
            parse_study(text.replace("[0.01, 0.02, 0.04]", "[0.01]"), "x"), "x", Options()
        )  # fmt: skip


@pytest.mark.parametrize("name", library())
def test_the_library_is_in_order(name):
    study = parse_study(library()[name], name)
    matrix = Matrix(study, name, Options(data="somewhere"))
    assert matrix.rows
    assert study.study.question
    frozen = (row.control_of or "frozen client" in row.name for row in matrix.rows)
    assert any(frozen) or name == "tau-by-cut"
