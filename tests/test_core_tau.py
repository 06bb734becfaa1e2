"""Adaptive tau: the controller alone, then a coordinator that gives every device its own slack."""

import itertools
import random

import msgspec
import pytest
from core_support import Desk, play, tiny_config

from server_node.actions import Step
from server_node.errors import ConfigError
from server_node.journal import RoundClosed, read_journal
from server_node.prepare import prepare
from server_node.replay import replay, share_scalars
from server_node.tau import TauController

STEP_S = 0.1


def controller(floor=4, cap=128, step_s=STEP_S):
    tau = TauController(floor, cap)
    tau.step_took(step_s)
    return tau


@pytest.mark.parametrize(
    ("done", "slack_s", "sharing", "steps"),
    [(1, 0.0, 1, 4), (1, -5.0, 1, 4), (1, 1.05, 1, 11), (1, 1.05, 2, 6), (1, 0.25, 1, 4),
     (1, 1e9, 1, 128), (3, 1.05, 1, 13)],
)  # fmt: skip
def test_steps_fill_a_devices_part_of_the_slack(done, slack_s, sharing, steps):
    assert controller().tau(done, slack_s, sharing) == steps


def test_nothing_measured_is_the_floor():
    tau = TauController(4, 128)
    tau.step_took(0.0)
    assert tau.tau(1, 100.0, 1) == 4
    assert tau.latency_s(0) is None


def test_latency_is_the_mean_and_twice_the_deviation():
    tau = controller()
    tau.arrived(0, 10.0)
    assert tau.latency_s(0) == 10.0
    tau.arrived(0, 14.0)
    assert tau.latency_s(0) == 10.0 + 0.25 * 4.0 + 2 * 0.25 * 4.0
    for _ in range(200):
        tau.arrived(0, 3.0)
    assert tau.latency_s(0) == pytest.approx(3.0)
    assert tau.latency_s(1) is None


def test_the_cap_is_halved_down_to_the_floor_and_raised_up_to_where_it_was():
    tau = controller()
    caps = [tau.cap]
    for _ in range(6):
        tau.lower()
        caps.append(tau.cap)
    assert caps == [128, 64, 32, 16, 8, 4, 4]
    assert tau.tau(1, 1e9, 1) == 4
    for _ in range(3):
        tau.raise_()
    assert tau.cap == 7
    for _ in range(100):
        tau.raise_()
    assert tau.cap == 128


def test_fixed_tau_is_a_cap_at_the_floor():
    assert not TauController(4, 0).adaptive
    assert controller(4, 0).tau(1, 1e9, 1) == 4


class Timed(Desk):
    """A desk on which a step takes STEP_S; devices deliver so long after a round's opening."""

    def play_round_after_start(self, latencies_s):
        self.start()
        return self.play_round(latencies_s)

    def play_round(self, latencies_s):
        opened_s = self.now_s
        due = sorted((opened_s + late_s, device) for device, late_s in latencies_s.items())
        closed = len(self.closed)
        while len(self.closed) == closed:
            while due and due[0][0] <= self.now_s:
                self.deliver(due.pop(0)[1])
            work = self.machine.next_work()
            if work is None:
                self.now_s = min(due[0][0], self.machine.wake_s())
                self.tick()
                continue
            pieces = [work]
            if isinstance(work, Step):
                pieces = self.machine.batch(work)
                self.now_s += STEP_S
                self.machine.step_took(STEP_S)
            for piece in pieces:
                self.compute(piece)
        *_, last = self.closed
        self.round_s = self.now_s - opened_s
        return {c.device: len(c.server_scalars) for c in last.contributions}


def test_devices_of_a_serial_server_share_the_slack_and_the_straggler_gets_the_floor():
    desk = Timed(rounds=9, tau=2, tau_cap=100)
    late = {0: 1.0, 1: 1.0, 2: 5.0}
    assert desk.play_round_after_start(late) == {0: 2, 1: 2, 2: 2}
    steps = desk.play_round(late)
    assert steps[2] == 2
    assert abs(steps[0] - steps[1]) <= 2
    assert sum(steps.values()) == pytest.approx(4.0 / STEP_S, abs=4)
    assert desk.round_s == pytest.approx(5.0 + 2 * STEP_S, abs=2 * STEP_S)


def test_with_a_replica_each_every_device_has_all_of_its_slack():
    desk = Timed(rounds=9, tau=2, tau_cap=100, replicas=3)
    late = {0: 1.0, 1: 3.0, 2: 5.0}
    desk.play_round_after_start(late)
    steps = desk.play_round(late)
    assert steps[0] == pytest.approx(40, abs=2)
    assert steps[1] == pytest.approx(20, abs=2)
    assert steps[2] == 2


def test_no_device_gets_more_than_the_cap_and_a_lowered_cap_counts_at_once():
    desk = Timed(rounds=9, tau=2, tau_cap=8)
    late = {0: 1.0, 1: 1.0, 2: 50.0}
    desk.play_round_after_start(late)
    assert desk.play_round(late) == {0: 8, 1: 8, 2: 2}
    desk.machine.tau.lower()
    assert desk.play_round(late) == {0: 4, 1: 4, 2: 2}


@pytest.mark.parametrize("directions", [0, 3])
def test_when_the_straggler_comes_early_the_steps_end(directions):
    desk = Timed(rounds=9, tau=2, tau_cap=100, directions=directions)
    desk.play_round_after_start({0: 1.0, 1: 1.0, 2: 9.0})
    steps = desk.play_round({0: 1.0, 1: 1.0, 2: 2.0})
    assert sum(steps.values()) <= 10 + 3 * 2 + 1
    assert desk.round_s <= 2.0 + 7 * STEP_S


def test_the_deadline_bounds_the_slack():
    desk = Timed(rounds=9, tau=2, tau_cap=100, deadline_s=3.0)
    late = {0: 1.0, 1: 1.0, 2: 20.0}
    desk.machine.tau.arrived(2, 20.0)
    steps = desk.play_round_after_start(late)
    assert set(steps) == {0, 1}
    assert sum(steps.values()) == pytest.approx(2.0 / STEP_S, abs=4)


def test_a_cap_below_the_floor_is_refused():
    with pytest.raises(ConfigError, match=r"method\.tau_cap: 1 is below method.tau, 2"):
        tiny_config("method.tau_mode=adaptive", "method.tau_cap=1")


def test_an_adaptive_run_replays_and_its_rows_show_the_mean_tau(tmp_path):
    config = tiny_config("method.tau_mode=adaptive", "method.tau_cap=9", "run.rounds=5")
    experiment = prepare(config, tmp_path)
    shuffle, ticks = random.Random(1), itertools.count()
    run = play(experiment, tmp_path / "run", shuffle, read_clock_s=lambda: float(next(ticks)))
    result = replay(tmp_path / "run", tmp_path)
    assert result.matches is True
    assert result.rounds == 5
    closed = [r for r in read_journal(tmp_path / "run" / "journal.bin").records
              if isinstance(r, RoundClosed)]  # fmt: skip
    steps = [[len(share_scalars(share)) for share in record.shares] for record in closed]
    assert max(map(max, steps)) > 2
    rows = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    means = [msgspec.json.decode(row)["tau"] for row in rows]
    assert means == [pytest.approx(sum(row) / len(row), abs=0.01) for row in steps]
    assert run.finished is not None
