"""Hybrid runs in real processes: first-order server, cut gradient, and a server killed with -9."""

from __future__ import annotations

import json

import pytest
from harness import TINY, Bench, Digests, flags, read_jsonl, undisturbed, wait_for_round, wait_until

HYBRID = {
    **TINY, "run.rounds": 10, "server.min_step_s": 0.05, "method.server_order": "first",
    "method.server_optimiser": "Adam", "method.eta_s": 0.003, "method.feedback": "cut_gradient",
}  # fmt: skip


def kill_server(bench: Bench) -> None:
    """SIGKILL to the emulated server."""
    (server, *_) = wait_until(
        lambda: [p for p in bench.survivors() if "serve" in p.cmdline()[2:5]], "a server"
    )
    server.kill()


@pytest.mark.parametrize("batch", ["device", "pooled"])
def test_a_hybrid_run_whose_server_is_killed_ends_in_the_undisturbed_digests(tmp_path, batch):
    overrides = {**HYBRID, "method.server_batch": batch}
    run = tmp_path / "run"
    with Bench(tmp_path) as bench:
        emulation = bench.start("emulate", "--out", "run", "--format", "json", *flags(overrides))
        wait_for_round(run, 4, 120.0)
        kill_server(bench)
        assert emulation.finish(180.0) == 0, emulation.stderr
        replayed = bench.run("replay", "run", "--format", "json")
    summary = json.loads(emulation.stdout)
    assert Digests.of(summary) == undisturbed(overrides)
    assert (summary["rounds"], summary["resumed"]) == (10, 1)
    assert [row["contributions"] for row in read_jsonl(run / "rounds.jsonl")] == [2] * 10
    result = json.loads(replayed.stdout)
    assert (result["matches"], result["complete"], result["notes"]) == (True, True, [])
    assert (result["server_first_round"], result["server_rounds"]) == (0, 10)


def test_the_gradient_crosses_a_small_packet_limit_in_parts_in_int8(tmp_path):
    """At 512 bytes everything is in parts; zeroth order this time."""
    overrides = {
        **TINY, "method.feedback": "cut_gradient", "wire.encoding": "int8",
        "wire.packet_limit": 512,
    }  # fmt: skip
    with Bench(tmp_path) as bench:
        emulation = bench.run("emulate", "--out", "run", "--format", "json", *flags(overrides))
    assert emulation.code == 0, emulation.stderr
    assert Digests.of(json.loads(emulation.stdout)) == undisturbed(overrides)
