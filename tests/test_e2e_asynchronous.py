"""A fleet of processes without a barrier: a late device holds nobody up, and everything replays."""

from __future__ import annotations

import json

import pytest
from harness import TINY, Bench, Digests, flags, here

from server_node.journal import RoundClosed, read_journal

COMMITS, LATE_S, LATE = 40, 1.0, 2
CONFIG = {
    **TINY, "run.rounds": COMMITS, "devices.count": 3, "round.mode": "asynchronous",
    "method.tau_mode": "adaptive", "method.tau_cap": 8, "evaluation.every": 20,
    "emulation.delay_s": [0.0, 0.0, LATE_S], "server.min_step_s": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asynchronous")
    with Bench(folder) as bench:
        child = bench.run("emulate", "--out", "run", "--format", "json", *flags(CONFIG))
        assert child.process.returncode == 0, child.stderr
    replayed = here("replay", str(folder / "run"), "--format", "json")
    assert replayed.exit_code == 0, replayed.stderr
    records = read_journal(folder / "run" / "journal.bin").records
    closed = [record for record in records if isinstance(record, RoundClosed)]
    return json.loads(child.stdout), json.loads(replayed.stdout), closed


def test_the_run_replays_to_its_digests(finished):
    summary, replayed, _ = finished
    assert replayed["matches"] is True
    assert Digests.of(replayed) == Digests.of(summary)


def test_every_commit_holds_one_contribution_and_the_late_device_holds_nobody_up(finished):
    summary, _, closed = finished
    assert [len(record.shares) for record in closed] == [1] * COMMITS
    by_device = [record.shares[0].device for record in closed]
    assert by_device.count(LATE) < min(by_device.count(0), by_device.count(1))
    late = [record.shares[0].staleness for record in closed if record.shares[0].device == LATE]
    assert all(staleness >= 5 for staleness in late)
    assert summary["seconds"] < COMMITS * LATE_S / 3
