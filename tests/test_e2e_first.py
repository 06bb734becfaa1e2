"""Hybrid runs in real processes: first-order server, cut gradient, and a server killed with -9."""

from __future__ import annotations

import json

from harness import (
    TINY,
    Bench,
    Digests,
    flags,
    here,
    read_jsonl,
    undisturbed,
    wait_for_round,
    wait_until,
)

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


def test_a_hybrid_run_whose_server_is_killed_ends_in_the_undisturbed_digests(tmp_path):
    """Over a small packet limit, where everything goes in parts, in int8."""
    overrides = {**HYBRID, "wire.encoding": "int8", "wire.packet_limit": 512}
    run = tmp_path / "run"
    with Bench(tmp_path) as bench:
        emulation = bench.start("emulate", "--out", "run", "--format", "json", *flags(overrides))
        wait_for_round(run, 4, 120.0)
        kill_server(bench)
        assert emulation.finish(180.0) == 0, emulation.stderr
    replayed = here("replay", str(run), "--format", "json")
    summary = json.loads(emulation.stdout)
    assert Digests.of(summary) == undisturbed(overrides)
    assert (summary["rounds"], summary["resumed"]) == (10, 1)
    assert [row["contributions"] for row in read_jsonl(run / "rounds.jsonl")] == [2] * 10
    result = json.loads(replayed.stdout)
    assert (result["matches"], result["complete"], result["notes"]) == (True, True, [])
    assert (result["server_first_round"], result["server_rounds"]) == (0, 10)
