"""One slow device among four: the server works while it waits, and waiting is all it costs."""

from __future__ import annotations

import json
import statistics
from typing import Any, NamedTuple

import pytest
from harness import TINY, Bench, flags, read_jsonl

TAU, STEP_S, LATE_S, ROUNDS, LATE = 4, 0.05, 2.0, 3, 3
CONFIG = {
    **TINY, "run.rounds": ROUNDS, "devices.count": 4, "method.tau": TAU,
    "server.min_step_s": STEP_S, "emulation.delay_s": [0.0, 0.0, 0.0, LATE_S],
}  # fmt: skip


class Waited(NamedTuple):
    """A finished run."""

    summary: dict[str, Any]
    rounds: list[dict[str, Any]]
    trace: list[dict[str, Any]]


@pytest.fixture(scope="module")
def waited(tmp_path_factory) -> Waited:
    folder = tmp_path_factory.mktemp("straggler")
    with Bench(folder) as bench:
        child = bench.run("emulate", "--out", "run", "--format", "json", *flags(CONFIG))
        assert child.process.returncode == 0, child.stderr
    trace = json.loads((folder / "run" / "trace.json").read_text())
    return Waited(json.loads(child.stdout), read_jsonl(folder / "run" / "rounds.jsonl"), trace)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_the_steps_for_the_others_are_done_before_the_late_activation_comes(waited, number):
    arrived = {
        event["args"]["device"]: event["ts"]
        for event in waited.trace
        if event["name"] == "activation arrived" and event["args"]["round"] == number
    }
    ends: dict[int, list[float]] = {device: [] for device in range(4)}
    for event in waited.trace:
        if event["name"] == "step" and event["args"]["round"] == number:
            ends[event["args"]["device"]].append(event["ts"] + event["dur"])
    assert {device: len(steps) for device, steps in ends.items()} == dict.fromkeys(range(4), TAU)
    assert max(arrived, key=arrived.__getitem__) == LATE
    assert all(max(ends[device]) < arrived[LATE] for device in range(3))
    assert min(ends[LATE]) > arrived[LATE]


def test_a_round_lasts_as_long_as_the_late_device_and_its_own_steps(waited):
    seconds = statistics.median(row["seconds"] for row in waited.rounds)
    assert len(waited.rounds) == ROUNDS
    assert LATE_S + TAU * STEP_S <= seconds <= (LATE_S + TAU * STEP_S) * 1.2


def test_the_work_done_while_waiting_is_counted_and_the_rest_is_not(waited):
    """Three devices' steps, every round, fall into the wait for the fourth; most of its do not."""
    busy_s, while_waiting_s = (
        waited.summary[f"server_busy{suffix}"] for suffix in ("_s", "_while_waiting_s")
    )
    assert while_waiting_s >= ROUNDS * 3 * TAU * STEP_S
    assert busy_s - while_waiting_s >= ROUNDS * (TAU - 2) * STEP_S
