"""Experiments on the virtual clock: the weights of real runs, times by closed form, absences."""

from __future__ import annotations

import csv
import itertools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from core_support import play, tiny_config

from emulation.delays import Delays
from emulation.simulate import Played, Simulation, simulate, simulate_curve
from emulation.virtual_fleet import VirtualFleet
from emulation.virtual_links import VirtualLinks
from server_node.actions import Outcome
from server_node.config import Config
from server_node.errors import ConfigError, NoProgressError
from server_node.prepare import prepare
from server_node.replay import replay
from wire_protocol.manifest import sha256
from wire_protocol.messages import Commit, DownMessage


def simulated(folder: Path, *overrides: str, frozen: bool = False) -> Played:
    """A tiny run on the virtual clock."""
    return Simulation(tiny_config(*overrides), folder).play(lambda _: None, frozen=frozen)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("wire.encoding=int8", "wire.compression=zstd"),
        ("method.client_optimiser=momentum", "devices.participants=2"),
        (
            "simulation.compute=exponential",
            "simulation.server=parallel",
            "simulation.server_step_s=0.1",
            "simulation.latency_s=0.05",
        ),
    ],
)
def test_the_weights_are_those_of_real_time(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = play(prepare(tiny_config(*overrides), tmp_path / "halves"), tmp_path / "real")
    result = simulated(tmp_path / "virtual", *overrides).result
    assert result.client_sha256 == sha256(run.client_state)
    assert result.server_sha256 == sha256(run.server)
    assert result.scores == run.scores
    replayed = replay(tmp_path / "virtual", tmp_path / "virtual")
    assert replayed.matches
    assert replayed.complete
    assert replayed.client_sha256 == result.client_sha256


def rows_of(config: Config) -> list[float]:
    return [row.simulated_s for row in simulate_curve(config)[1]]


def test_a_round_takes_the_slowest_device_and_its_share_of_the_server() -> None:
    config = tiny_config(
        "simulation.compute=exponential", "simulation.mean_s=[1, 1, 10]",
        "simulation.server=parallel", "simulation.server_step_s=0.001",
        "simulation.server_measure_s=0.01",
    )  # fmt: skip
    delays = Delays(config.simulation, config.run.seed, directions=3)
    expected, at_s = [], 0.0
    for number in range(3):
        # The slowest device's steps are over when its differences come: K measurements remain.
        at_s += max(delays.compute_s(device, number) for device in range(3)) + 3 * 0.01
        expected.append(at_s)
    assert rows_of(config) == pytest.approx(expected, rel=1e-3)


def test_a_serial_server_makes_the_devices_wait_for_each_other() -> None:
    common = ("simulation.compute=uniform", "simulation.spread=0", "simulation.mean_s=[0.1]")
    step = "simulation.server_step_s=1"
    serial = rows_of(tiny_config(*common, step))
    parallel = rows_of(tiny_config(*common, step, "simulation.server=parallel"))
    # tau = 2, three devices: the first activation comes after one of seven forwards.
    assert serial[0] == pytest.approx(0.1 / 7 + 6.0)
    assert parallel[0] == pytest.approx(0.1 / 7 + 2.0)


def test_links_take_time_and_bytes_are_those_of_the_frames() -> None:
    fast, slow = (
        simulate_curve(tiny_config(*given))[1]
        for given in ((), ("simulation.up_bytes_s=[1000]", "simulation.latency_s=0.5"))
    )
    assert fast[-1].simulated_s == 0.0
    frames = 8 * 12 * 4 * (1 + 3) + 8 + 2 * 72  # h with labels, three differences in one frame
    each = fast[-1].bytes_up / 9
    assert frames < each < frames + 1000  # topics, acknowledgements, a report
    assert slow[0].simulated_s == pytest.approx(0.5 + (frames + 100) / 1000 + 0.5, abs=0.1)
    assert fast[-1].client_forwards == 9 * 7


@pytest.mark.parametrize(
    "changed",
    [
        (),
        ("round.mode=asynchronous",),
        ("method.feedback=cut_gradient",),
        ("method.feedback=cut_gradient", "method.server_order=first",
         "method.server_batch=pooled"),
        ("wire.encoding=float16",),
    ],
)  # fmt: skip
def test_a_client_half_that_explodes_is_told_as_divergence(changed: tuple[str, ...]) -> None:
    """Its weights are finite, what they make of a batch is not: every device sends that."""
    config = tiny_config(
        "model.name=mlp:64-12-12-10", "model.cut=fc2", "devices.count=6", "devices.participants=3",
        "method.eta_c=1e25", "method.schedule=constant", "run.rounds=30",
        "evaluation.every=30", *changed,
    )  # fmt: skip
    result, _ = simulate_curve(config)
    assert result.outcome == Outcome.DIVERGED.value
    assert "finite" in result.detail


def test_nobody_sleeps(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    played = simulated(
        tmp_path, "simulation.compute=exponential", "simulation.mean_s=[1000]",
        "server.min_step_s=100", "round.stall_s=1e6",
    )  # fmt: skip
    assert played.simulated_s > 1800
    assert time.monotonic() - begin_s < 120


def test_deadline_and_quorum_drop_the_straggler() -> None:
    given = ("simulation.compute=uniform", "simulation.spread=0", "simulation.mean_s=[1, 1, 50]",
             "round.deadline_s=5", "round.quorum=2")  # fmt: skip
    result, rows = simulate_curve(tiny_config(*given))
    assert result.outcome == "complete"
    assert result.contributions == 6
    assert [row.simulated_s for row in rows] == pytest.approx([5.0, 10.0, 15.0])


def test_frames_that_a_device_had_not_sent_when_its_round_ended_are_not_counted() -> None:
    """Its next round is stopped too before they would have been ready."""
    given = ("run.rounds=6", "devices.count=2", "simulation.compute=uniform",
             "simulation.spread=0", "round.deadline_s=5", "simulation.mean_s=[0.1, 12]",
             "simulation.latency_s=2")  # fmt: skip
    _, rows = simulate_curve(tiny_config(*given))
    spent = [later.bytes_up - row.bytes_up for row, later in itertools.pairwise(rows)]
    assert max(spent) - min(spent) < 100  # numbers grow; a frame has 400 bytes


def test_a_clock_that_has_run_for_centuries_still_moves(tmp_path: Path) -> None:
    played = simulated(
        tmp_path, "run.rounds=40", "simulation.compute=uniform", "simulation.mean_s=[1e9]",
        "round.stall_s=1e12", "round.rejoin_s=60.1", "simulation.up_s=1e9", "simulation.down_s=1e9",
    )  # fmt: skip
    assert played.result.outcome == "complete"


def test_a_device_that_was_away_for_long_is_told_of_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, missed = Counter[int](), Counter[int]()

    def send(self: VirtualLinks, device: int, message: DownMessage) -> float:
        sent[device] += isinstance(message, Commit)
        return one(self, device, message)

    def caught_up(self: VirtualFleet, device: int, known: int) -> int:
        missed[device] += self.run.rounds_closed - known
        longest.append(self.run.rounds_closed - known)
        return near(self, device, known)

    one, near, longest = VirtualLinks.send, VirtualFleet._caught_up, [0]
    monkeypatch.setattr(VirtualLinks, "send", send)
    monkeypatch.setattr(VirtualFleet, "_caught_up", caught_up)
    simulated(
        tmp_path, "run.rounds=900", "model.name=mlp:64-512-10", "devices.batch=1",
        "method.directions_client=1", "method.eta_c=0.001", "method.eta_s=0.0001",
        "evaluation.every=900", "simulation.compute=uniform",
        "simulation.spread=0", "simulation.up_s=200", "simulation.down_s=400",
        "round.rejoin_s=0", "round.stall_s=1e9",
    )  # fmt: skip
    assert max(longest) > 512
    assert sent == missed


def test_a_run_stalls_in_virtual_time(tmp_path: Path) -> None:
    given = ("simulation.compute=uniform", "simulation.mean_s=[1000]", "round.stall_s=100")
    with pytest.raises(NoProgressError, match="waited 100 s"):
        simulate(tiny_config(*given, "evaluation.control=false"), tmp_path, lambda _: None)


def test_devices_leave_and_return(tmp_path: Path) -> None:
    given = ("run.rounds=40", "simulation.compute=exponential", "simulation.up_s=20",
             "simulation.down_s=5", "round.rejoin_s=3")  # fmt: skip
    played = simulated(tmp_path / "a", *given)
    assert played.result.outcome == "complete"
    assert 40 <= played.result.contributions < 120  # some were away
    assert replay(tmp_path / "a", tmp_path / "a").matches
    assert simulated(tmp_path / "b", *given).rows == played.rows


def test_the_folder_of_a_simulation(tmp_path: Path) -> None:
    summary = simulate(tiny_config("simulation.compute=exponential"), tmp_path, lambda _: None)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["simulated_s"] > 0
    assert summary["simulated_s_control"] > 0
    assert summary["accuracy_frozen_client"] is not None
    assert summary["client_forwards_per_client_round"] == 7
    with (tmp_path / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["simulated_s"]) == pytest.approx(summary["simulated_s"])
    assert (tmp_path / "accuracy.png").exists()
    assert not (tmp_path / "trace.json").exists()
    with pytest.raises(ConfigError, match="holds a run already"):
        simulate(tiny_config(), tmp_path, lambda _: None)


def test_a_simulation_that_is_stopped_in_its_control_has_its_summary(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "run" and event["frozen"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tiny_config(), tmp_path, stop)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["outcome"] == "complete"
    assert summary["accuracy_frozen_client_reason"] == "the control run was not finished"
    assert (tmp_path / "accuracy.png").exists()


def test_a_device_that_trains_nothing_has_no_control(tmp_path: Path) -> None:
    config = tiny_config('model.perturb=["none"]', "run.rounds=1")
    summary = simulate(config, tmp_path, lambda _: None)
    assert "trains nothing" in summary["accuracy_frozen_client_reason"]


def test_a_stalled_run_names_what_its_mode_has(tmp_path: Path) -> None:
    given = ("round.mode=asynchronous", "simulation.compute=uniform", "simulation.mean_s=[1000]",
             "round.stall_s=100")  # fmt: skip
    with pytest.raises(NoProgressError, match=r"; set a longer round\.stall_s$"):
        simulate(tiny_config(*given), tmp_path, lambda _: None)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.server_order=first", "round.mode=asynchronous"),
        ("method.feedback=cut_gradient", "round.mode=asynchronous"),
        ("method.feedback=cut_gradient", "method.server_order=first"),
    ],
)
def test_steps_far_too_large_diverge_in_every_mode(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """A gradient that no device takes must not leave everybody waiting."""
    fields = ("run.rounds=20", "method.eta_s=1e30", "method.eta_c=1e30", *overrides)
    assert simulated(tmp_path, *fields).result.outcome == "diverged"


@pytest.mark.parametrize("feedback", ["loss_difference", "cut_gradient"])
@pytest.mark.parametrize("order", ["zeroth", "first"])
@pytest.mark.parametrize(
    "mode", [("barrier", "device"), ("barrier", "pooled"), ("asynchronous", "device")], ids="-".join
)
def test_every_mode_replays_when_things_happen_between_the_steps(
    tmp_path: Path, mode: tuple[str, str], order: str, feedback: str
) -> None:
    """A serial server needs time for each step, and answers and frames come meanwhile."""
    played = simulated(
        tmp_path, f"round.mode={mode[0]}", f"method.server_batch={mode[1]}",
        f"method.server_order={order}", f"method.feedback={feedback}", "method.tau=4",
        "run.rounds=30", "simulation.compute=exponential", "simulation.server_step_s=0.1",
    )  # fmt: skip
    assert played.result.outcome == "complete"
    assert replay(tmp_path, tmp_path).matches


def test_a_device_whose_work_grew_stale_begins_anew(tmp_path: Path) -> None:
    played = simulated(
        tmp_path, "round.mode=asynchronous", "round.staleness_limit=3", "run.rounds=30",
        "simulation.compute=uniform", "simulation.spread=0", "simulation.mean_s=[1, 1, 2.5]",
    )  # fmt: skip
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    dropped = [row["dropped"] for row in map(json.loads, lines)]
    assert sum(dropped) > 2
    assert played.result.outcome == "complete"


def test_guards_lower_the_cap_of_adaptive_tau() -> None:
    """Steps that are taken back leave less and less slack to fill; without guards it is filled."""
    taus = {}
    for reject in ("false", "true"):
        config = tiny_config(
            "run.rounds=12", "method.tau_mode=adaptive", "method.tau=1", "method.tau_cap=64",
            "method.eta_s=0.3", "evaluation.control=false", "guards.patience=0",
            "simulation.compute=uniform", "simulation.spread=0.0", "simulation.mean_s=[1,1,5]",
            "simulation.server_step_s=0.05", f"guards.reject={reject}",
        )  # fmt: skip
        _, rows = simulate_curve(config)
        taus[reject] = [row.tau for row in rows][-3:]
    assert max(taus["true"]) < min(taus["false"])
