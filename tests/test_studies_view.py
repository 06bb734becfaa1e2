"""How far a study is, while its runs last: on a terminal, and in a log."""

import os
import pty
import re
import subprocess
import sys
from io import StringIO

import pytest
from core_support import tiny_config

from studies.cells import Result, Spec
from studies.definition import Setting
from studies.matrix import Row
from studies.runner import Job
from studies.view import StudyView

STUDY = """
[study]
title = "One long run"
seeds = 1
[base]
run.rounds = 400
model = { name = "mlp:64-12-10", cut = "fc1" }
devices = { count = 2, batch = 8 }
method = { tau = 1, eta_c = 0.01, eta_s = 0.001 }
evaluation.every = 400
[[setting]]
name = "iid"
[[arm]]
name = "only"
"""
BASELINE = STUDY.replace("400", "4000") + 'kind = "baseline:first_order_client"\n'  # quick rounds


def on_terminal(command):
    """What a terminal of 120 columns shows of a command, escapes and all."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:  # Linux says so at the end of a terminal
            pass
        os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


@pytest.mark.parametrize("text", [STUDY, BASELINE], ids=["method", "baseline"])
def test_the_bar_moves_within_a_run(tmp_path, text):
    file = tmp_path / "long.toml"
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    shown = on_terminal([sys.executable, "-m", "musplit", "study", file, "--out", out])
    assert len((out / "raw.csv").read_text().splitlines()) == 2  # it did not diverge
    parts = [int(percent) for percent in re.findall(r"(\d+)% \d/1", shown)]
    assert parts == sorted(parts)
    assert parts[-1] == 100
    assert any(0 < part < 100 for part in parts)


def job(seed):
    spec = Spec("musplit", tiny_config(), {}, "")
    setting = Setting("iid")
    return Job(setting, Row("arm", "arm", "musplit", {}, (), "", {}, ()), seed, None, spec)


def test_a_log_gets_a_line_a_minute_while_runs_last():
    stream, now_s = StringIO(), [0.0]
    with StudyView(stream, lambda: now_s[0]) as view:
        view.begin("test", total=5, finished=3, damaged=0)
        for second in range(0, 150, 10):
            now_s[0] = float(second)
            view.advanced(job(0), second / 200)
            view.advanced(job(1), second / 400)
        view.done(job(0), Result([], "complete", 1, 1, 1, 1, None, 150.0), "")
    assert stream.getvalue().splitlines() == [
        "test: 5 runs, 3 of them finished before",
        "3/5, under way iid, arm, seed 0: 30%; iid, arm, seed 1: 12%",
        "3/5, under way iid, arm, seed 0: 60%; iid, arm, seed 1: 28%",
        "4/5 iid, arm, seed 0: no point, complete, 150.0 s",
    ]
