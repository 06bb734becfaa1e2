"""Kill -9 of every kind on real processes, and the resumption of what was stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
from harness import (
    DIGITS,
    TINY,
    Bench,
    Digests,
    flags,
    make_shards,
    read_jsonl,
    undisturbed,
    wait_for_round,
    wait_until,
)

# About 0.2 s a round.
STEADY = {**TINY, "run.rounds": 24, "server.min_step_s": 0.05}


def below(bench: Bench, word: str) -> list[psutil.Process]:
    """The running processes of the bench whose musplit command is `word`, and their children."""
    found = [p for p in bench.survivors() if word in p.cmdline()[2:5]]
    return [*found, *(child for p in found for child in p.children(recursive=True))]


def kill(bench: Bench, word: str) -> None:
    """SIGKILL to all of them at once."""
    victims = wait_until(lambda: below(bench, word), f"a {word}")
    for process in victims:
        process.kill()


def rounds(run: Path) -> int:
    """Rounds recorded so far."""
    return len(read_jsonl(run / "rounds.jsonl"))


def test_an_emulation_whose_parts_and_then_all_of_it_are_killed_ends_in_the_undisturbed_digests(
    tmp_path,
):
    """Server, broker, all devices, then the emulator itself, which is resumed with --resume."""
    run = tmp_path / "run"
    with Bench(tmp_path) as bench:
        emulation = bench.start("emulate", "--out", "run", *flags(STEADY))
        for word in ("serve", "broker", "device"):
            wait_for_round(run, rounds(run) + 1, 120.0)
            kill(bench, word)
        wait_for_round(run, rounds(run) + 1, 120.0)
        emulation.kill()
        assert rounds(run) < 24
        resumed = bench.start("emulate", "--resume", "run", "--format", "json")
        assert resumed.finish(120.0) == 0, resumed.stderr
        again = bench.run("emulate", "--resume", "run", "--format", "json")
        replayed = bench.run("replay", "run", "--format", "json")
    for name in ("server", "broker", "device-000", "device-001"):
        assert f"{name} ended (code " in emulation.stderr
    summary = json.loads(resumed.stdout)
    assert Digests.of(summary) == undisturbed(STEADY)
    assert (summary["rounds"], summary["client_rounds"], summary["resumed"]) == (24, 48, 2)
    assert [row["round"] for row in read_jsonl(run / "rounds.jsonl")] == list(range(24))
    assert again.code == 0
    assert "24 of 24 rounds are closed (complete)" in again.stderr
    assert json.loads(again.stdout) == summary
    result = json.loads(replayed.stdout)
    assert (result["matches"], result["complete"], result["notes"]) == (True, True, [])


def test_a_server_by_hand_is_resumed_for_devices_that_waited(tmp_path):
    """Killed with -9, then ended by Ctrl-C, after which the devices have to be started again."""
    run = tmp_path / "run"
    with Bench(tmp_path) as bench:
        address = bench.broker()
        shards = make_shards(tmp_path / "shards")
        server = bench.serve(address, run, STEADY)
        server.wait_for("waiting for", 120.0)
        refused = bench.run("serve", "--resume", str(run), "--broker", str(address))
        devices = [bench.device(f"d{i}", address, shards[i]) for i in range(2)]
        wait_for_round(run, 2, 120.0)
        server.kill()
        server = bench.start("serve", "--resume", str(run), "--broker", str(address))
        wait_for_round(run, rounds(run) + 1, 120.0)
        assert [device.code for device in devices] == [None, None]
        server.signal(signal.SIGINT)
        assert server.finish() == 130
        assert [device.finish(15.0) for device in devices] == [0, 0]
        server = bench.start("serve", "--resume", str(run), "--broker", str(address))
        for index in (1, 0):  # the order of return does not matter
            bench.device(f"d{index}", address, shards[index])
        assert server.finish() == 0, server.stderr
    assert refused.code == 3
    assert "another server uses this run folder" in refused.stderr
    assert Digests.of(json.loads((run / "summary.json").read_text())) == undisturbed(STEADY)


def test_what_cannot_be_resumed_is_told_in_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    cases = (
        (["serve", "--resume", "run", "--broker", "127.0.0.1:1"], 3, "nothing to resume"),
        (["emulate", "--resume", "run"], 3, "nothing to resume"),
        (["serve", str(DIGITS), "--resume", "run", "--broker", "h"], 2, "leave out CONFIG"),
        (["emulate", "--resume", "run", "--quick"], 2, "leave out --set"),
        (["serve", "--broker", "127.0.0.1:1"], 2, "give CONFIG, or --resume RUN"),
    )
    with Bench(tmp_path) as bench:
        for arguments, code, text in cases:
            child = bench.run(*arguments)
            assert child.code == code, child.stderr
            assert text in child.stderr
            assert len(child.stderr.splitlines()) == 1
