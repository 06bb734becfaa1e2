"""Faults in mid-run: killed devices, cut and held connections, signals."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from harness import (
    TINY,
    Bench,
    Child,
    Digests,
    Proxy,
    flags,
    here,
    make_shards,
    read_jsonl,
    undisturbed,
    wait_for_round,
    wait_until,
)

# About 0.2 s a round, so that there is a middle to disturb.
STEADY = {**TINY, "run.rounds": 20, "server.min_step_s": 0.05}
# Devices save their weights every 5 s: long enough that they do so once.
LONG = {**STEADY, "run.rounds": 40}


class Bed(NamedTuple):
    """A broker, a running server, and two devices behind a proxy each."""

    bench: Bench
    run: Path
    server: Child
    proxies: list[Proxy]
    devices: list[Child]

    def start_device(self, index: int) -> None:
        """Start a device, again with the same command."""
        shard = self.run.parent / "shards" / f"shard-{index:03d}.npz"
        self.devices[index] = self.bench.device(f"d{index}", self.proxies[index].address, shard)

    def finish(self) -> dict[str, Any]:
        """The summary; every program ended by itself with 0."""
        assert self.server.finish() == 0, self.server.stderr
        assert [device.finish(15.0) for device in self.devices] == [0, 0]
        summary: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return summary


def make_bed(bench: Bench, overrides: dict[str, object]) -> Bed:
    """Start everything and return once round 3 is over."""
    address = bench.broker()
    make_shards(bench.folder / "shards")
    run = bench.folder / "run"
    server = bench.serve(address, run, overrides)
    bed = Bed(bench, run, server, [bench.proxy(address) for _ in range(2)], [server, server])
    for index in range(2):
        bed.start_device(index)
    wait_for_round(run, 3)
    return bed


def sessions(run: Path, device_id: str) -> list[list[int]]:
    """The rounds that each session of a device computed, in order of the sessions."""
    rounds: dict[int, list[int]] = {}
    for row in read_jsonl(run / "devices.jsonl"):
        if row["device_id"] == device_id and row["started_unix_s"]:
            rounds.setdefault(row["epoch"], []).append(row["round"])
    return list(rounds.values())


class Killed(NamedTuple):
    """A finished run whose devices were both killed: d0 kept its state folder, d1 lost it."""

    run: Path
    summary: dict[str, Any]
    stderr: dict[str, str]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    with Bench(folder) as bench:
        bed = make_bed(bench, LONG)
        kept, lost = (bench.state_folder(f"d{i}") / "weights.state" for i in range(2))
        wait_until(lambda: kept.exists() and lost.exists(), "saved weights")
        bed.devices[0].kill()
        bed.start_device(0)
        bed.devices[1].kill()
        lost.parent.rename(folder / "lost")
        bed.start_device(1)
        summary = bed.finish()
        return Killed(bed.run, summary, {f"d{i}": bed.devices[i].stderr for i in range(2)})


def test_a_run_whose_devices_were_killed_ends_in_the_undisturbed_digests(killed):
    assert Digests.of(killed.summary) == undisturbed(LONG)
    assert killed.summary["client_rounds"] == 2 * 40


@pytest.mark.parametrize("device_id", ["d0", "d1"])
def test_a_restarted_device_takes_part_until_the_end(killed, device_id):
    before, after = sessions(killed.run, device_id)
    assert before == list(range(len(before)))
    assert after == list(range(after[0], 40))
    assert 3 < after[0] <= len(before) + 1
    assert len(after) > 1


def test_a_device_with_its_state_goes_on_where_it_saved(killed):
    line = next(line for line in killed.stderr["d0"].splitlines() if "from round" in line)
    assert 0 < int(line.split("from round ")[1].split()[0]) < 40
    assert "fetching bundle" not in killed.stderr["d0"]


def test_a_device_without_its_state_fetches_the_bundle_and_starts_from_round_0(killed):
    assert "from round 0 of 40" in killed.stderr["d1"]
    assert "fetching bundle" in killed.stderr["d1"]


def test_a_device_that_misses_deadlines_is_left_out_and_comes_back(tmp_path):
    """Its held frames come late, are counted, and change nothing that replay does not know."""
    overrides = {**STEADY, "run.rounds": 16, "round.deadline_s": 0.8, "round.quorum": 1}
    with Bench(tmp_path) as bench:
        bed = make_bed(bench, overrides)
        bed.proxies[1].hold_uplink()
        held_at = len(read_jsonl(bed.run / "rounds.jsonl"))
        wait_for_round(bed.run, held_at + 3)
        bed.proxies[1].release_uplink()
        summary = bed.finish()
    replayed = here("replay", str(bed.run), "--format", "json")
    rounds = read_jsonl(bed.run / "rounds.jsonl")
    assert [row["round"] for row in rounds] == list(range(16))
    assert sum(row["dropped"] for row in rounds) >= 2
    assert sum(row["late_frames"] for row in rounds) >= 1
    assert 2 in [row["contributions"] for row in rounds[held_at + 4 :]]
    assert replayed.exit_code == 0, replayed.stdout
    assert Digests.of(json.loads(replayed.stdout)) == Digests.of(summary)


def test_a_device_whose_connection_is_cut_reconnects_and_loses_nothing(tmp_path):
    with Bench(tmp_path) as bench:
        bed = make_bed(bench, STEADY)
        assert bed.proxies[0].cut() == 2
        bed.devices[0].wait_for("reconnecting")
        summary = bed.finish()
        assert bed.proxies[0].connections == 2
    assert Digests.of(summary) == undisturbed(STEADY)
    assert len(sessions(bed.run, "d0")) == 1
    assert summary["client_rounds"] == 2 * 20


def runs(process: psutil.Process) -> bool:
    """False also for one that has ended and that nobody has waited for yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def below(emulation: Child) -> list[psutil.Process]:
    """The processes under an emulation, once its server is among them."""
    found = psutil.Process(emulation.pid).children(recursive=True)
    return found if any("serve" in process.cmdline() for process in found) else []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_an_emulation_that_is_ended(tmp_path, number):
    """Neither Ctrl-C in mid-run nor kill at the start leaves a broker, server or device running.

    Nor does kill -9: test_e2e_survive.
    """
    with Bench(tmp_path) as bench:
        emulation = bench.start("emulate", "--out", "run", *flags(STEADY))
        if number is signal.SIGINT:
            wait_for_round(tmp_path / "run", 1)  # two devices run too
        started = wait_until(lambda: below(emulation), "a server")
        assert {process.pid for process in started} < {p.pid for p in bench.survivors()}
        emulation.signal(number)
        assert emulation.finish(20.0) == 130
        assert bench.left_behind() == []
        assert not any(runs(process) for process in started)
        assert "Traceback" not in emulation.stderr
    assert emulation.stderr.splitlines()[-1] == "musplit: error: interrupted"
