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
    here,
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


def runs(process: psutil.Process) -> bool:
    """False also for one that has ended and that nobody has waited for yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sessions(run: Path, device_id: str) -> int:
    """How often a device was started, or rather took part."""
    rows = read_jsonl(run / "devices.jsonl")
    return len({row["epoch"] for row in rows if row["device_id"] == device_id})


def test_an_emulation_whose_parts_and_then_all_of_it_are_killed_ends_in_the_undisturbed_digests(
    tmp_path,
):
    """Server, broker, all devices, then the emulator itself, which is resumed with --resume.

    The emulator leaves nothing running behind, not even so.
    """
    run = tmp_path / "run"
    with Bench(tmp_path) as bench:
        emulation = bench.start("emulate", "--out", "run", *flags(STEADY))
        for word in ("serve", "broker", "device"):
            wait_for_round(run, rounds(run) + 1, 120.0)
            kill(bench, word)
        wait_for_round(run, rounds(run) + 1, 120.0)
        started = psutil.Process(emulation.pid).children(recursive=True)
        assert len(started) >= 4  # a broker, a server, two devices
        emulation.kill()
        wait_until(lambda: not any(map(runs, started)), "the end of all processes", 10.0)
        assert bench.left_behind() == []
        assert rounds(run) < 24
        resumed = bench.start("emulate", "--resume", "run", "--format", "json")
        assert resumed.finish(120.0) == 0, resumed.stderr
        again = bench.run("emulate", "--resume", "run", "--format", "json")
    replayed = here("replay", str(run), "--format", "json")
    for name in ("server", "broker", "device-000", "device-001"):  # devices wait for the others
        assert emulation.stderr.count(f"{name} ended (code ") == 1
    summary = json.loads(resumed.stdout)
    assert Digests.of(summary) == undisturbed(STEADY)
    assert (summary["rounds"], summary["client_rounds"], summary["resumed"]) == (24, 48, 2)
    assert [row["round"] for row in read_jsonl(run / "rounds.jsonl")] == list(range(24))
    assert [sessions(run, f"device-00{n}") for n in range(2)] == [3, 3]
    assert again.code == 0
    assert "24 of 24 rounds are closed (complete)" in again.stderr
    assert json.loads(again.stdout) == summary
    result = json.loads(replayed.stdout)
    assert (result["matches"], result["complete"], result["notes"]) == (True, True, [])


def test_a_server_that_was_interrupted_is_resumed_for_devices_that_come_back(tmp_path):
    """Ended by Ctrl-C, after which the devices have to be started again, in any order."""
    run = tmp_path / "run"
    with Bench(tmp_path) as bench:
        address = bench.broker()
        shards = make_shards(tmp_path / "shards")
        server = bench.serve(address, run, STEADY)
        devices = [bench.device(f"d{i}", address, shards[i]) for i in range(2)]
        wait_for_round(run, 2, 120.0)
        refused = here("serve", "--resume", str(run), "--broker", str(address))
        server.signal(signal.SIGINT)
        assert server.finish() == 130
        assert [device.finish(15.0) for device in devices] == [0, 0]
        server = bench.start("serve", "--resume", str(run), "--broker", str(address))
        for index in (1, 0):
            bench.device(f"d{index}", address, shards[index])
        assert server.finish() == 0, server.stderr
    assert refused.exit_code == 3
    assert "another server uses this run folder" in refused.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert Digests.of(summary) == undisturbed(STEADY)
    assert summary["resumed"] == 1


def test_what_cannot_be_resumed_is_told_in_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    cases = (
        (["serve", "--resume", "run", "--broker", "127.0.0.1:1"], 3, "nothing to resume"),
        (["emulate", "--resume", "run"], 3, "nothing to resume"),
        (["serve", str(DIGITS), "--resume", "run", "--broker", "h"], 2, "leave out CONFIG"),
        (["emulate", "--resume", "run", "--quick"], 2, "leave out --set"),
        (["serve", "--broker", "127.0.0.1:1"], 2, "give CONFIG, or --resume RUN"),
    )
    for arguments, code, text in cases:
        done = here(*arguments, cwd=tmp_path)
        assert done.exit_code == code, done.stderr
        assert text in done.stderr
        assert len(done.stderr.splitlines()) == 1
