"""The coordinator's rounds: who contributes what, in which order the server works, what is late."""

import itertools
import math
import random

import pytest
from core_support import RULES, Desk, client_scalar, server_scalar

from server_node.actions import (
    CloseRound,
    Contribution,
    Finish,
    Ignore,
    Measure,
    OpenRound,
    Outcome,
    Reply,
    Step,
)
from server_node.coordination import BARREN
from wire_protocol.directions import participants


@pytest.fixture
def desk():
    desk = Desk()
    assert desk.start() == [OpenRound(0, [0, 1, 2])]
    return desk


def contribution(number, device, tau=RULES.tau, directions=RULES.directions):
    return Contribution(
        device,
        [client_scalar(number, device, k) for k in range(directions)],
        [[server_scalar(number, device, step)] for step in range(tau)],
    )


def test_round_closes_when_all_are_complete_with_contributions_by_device(desk):
    desk.deliver(2, 0)
    assert desk.compute_all() == [
        Reply(2, 0, [20.0, 21.0, 22.0]),
        Reply(0, 0, [0.0, 1.0, 2.0]),
    ]
    desk.deliver(1)
    assert desk.compute_all() == [
        Reply(1, 0, [10.0, 11.0, 12.0]),
        CloseRound(0, [contribution(0, d) for d in (0, 1, 2)], {}, 1000.0),
        OpenRound(1, [0, 1, 2]),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_order_of_arrival_and_of_work_does_not_change_the_commit(seed):
    shuffle = random.Random(seed)
    desk = Desk()
    desk.start()
    frames = [(d, part) for d in range(3) for part in ("activation", (0, 2), (2, 1))]
    shuffle.shuffle(frames)
    for device, part in frames:
        got = desk.activation(device) if part == "activation" else desk.differences(device, *part)
        assert got == []
        while shuffle.random() < 0.6 and (work := desk.machine.next_work()):
            desk.compute(work)
    desk.compute_all()
    assert desk.closed == [
        CloseRound(0, [contribution(0, device) for device in range(3)], {}, 1000.0)
    ]


def test_run_is_complete_after_its_rounds(desk):
    for number in range(RULES.rounds):
        assert desk.machine.round == number
        desk.deliver(0, 1, 2)
        actions = desk.compute_all()
    assert isinstance(actions[-1], Finish)
    assert actions[-1].outcome is Outcome.COMPLETE
    assert [closed.round for closed in desk.closed] == [0, 1, 2]
    assert desk.machine.next_work() is None
    assert desk.machine.wake_s() is None
    assert desk.tick(1e9) == []


# -- what the server does with its time


def test_steps_start_with_the_activation_and_need_no_differences(desk):
    assert desk.machine.next_work() is None
    desk.activation(1)
    assert desk.machine.next_work() == Step(1, 0)
    desk.compute(Step(1, 0))
    assert desk.machine.next_work() == Step(1, 1)
    desk.compute(Step(1, 1))
    assert desk.machine.next_work() is None
    desk.differences(1, 0, 3)
    assert desk.machine.next_work() == Measure(1, 0)


def test_differences_wait_for_their_activation_and_for_all_steps(desk):
    desk.differences(1, 0, 3)
    assert desk.machine.next_work() is None
    desk.activation(1)
    work = []
    while (piece := desk.machine.next_work()) is not None:
        work.append(piece)
        desk.compute(piece)
    assert work == [Step(1, 0), Step(1, 1), Measure(1, 0)]


def test_steps_go_to_the_first_activation_until_it_has_all_of_them(desk):
    desk.activation(2)
    desk.activation(0)
    work = []
    while (piece := desk.machine.next_work()) is not None:
        work.append(piece)
        desk.compute(piece)
    assert work == [Step(2, 0), Step(2, 1), Step(0, 0), Step(0, 1)]


def test_answers_come_before_steps_and_lower_directions_first(desk):
    desk.activation(0)
    desk.compute_all()
    desk.activation(1)
    desk.differences(0, 2, 1)
    assert desk.machine.next_work() == Measure(0, 2)
    desk.differences(0, 0, 2)
    assert desk.machine.next_work() == Measure(0, 0)


def test_waiting_ends_with_the_last_frame_not_with_the_last_work(desk):
    desk.deliver(0, 1)
    desk.activation(2)
    assert desk.machine.waiting
    desk.differences(2, 0, 3)
    assert not desk.machine.waiting
    assert desk.machine.next_work() == Step(0, 0)


def test_frozen_client_is_complete_after_its_steps_and_sends_no_differences():
    desk = Desk(directions=0, participants=1)
    (opened,) = desk.start()
    (device,) = opened.participants
    desk.activation(device)
    assert desk.differences(device, 0, 1) == [Ignore(device, "directions out of range")]
    assert desk.compute_all() == [
        Reply(device, 0, []),
        CloseRound(0, [contribution(0, device, directions=0)], {}, 1000.0),
        OpenRound(1, participants(1, 1, [0, 1, 2], 1)),
    ]


# -- frames that change nothing


@pytest.mark.parametrize(
    ("before", "frame", "why"),
    [
        (["activation", 0], ["activation", 0], "duplicate"),
        (["differences", 0, 1, 2], ["differences", 0, 1, 2], "duplicate"),
        (["differences", 0, 1, 2], ["differences", 0, 1, 1], "duplicate"),
        (["differences", 0, 1, 2], ["differences", 0, 0, 2], "directions out of range"),
        (["differences", 0, 0, 2], ["differences", 0, 1, 2], "directions out of range"),
        (["differences", 0, 1, 1], ["differences", 0, 0, 3], "directions out of range"),
        (["activation", 0], ["differences", 0, 0, 4], "directions out of range"),
        (["activation", 0], ["differences", 0, 3, 1], "directions out of range"),
        (["activation", 0], ["activation", 0, 1], "not asked"),
        (["activation", 0], ["differences", 0, 0, 3, 7], "not asked"),
        (["activation", 0], ["activation", 9], "not asked"),
        (["activation", 0], ["differences", 9, 0, 3], "not asked"),
    ],
)
def test_useless_frame_is_ignored_with_its_reason_and_changes_nothing(desk, before, frame, why):
    kind, device, *rest = before
    assert getattr(desk, kind)(device, *rest) == []
    kind, device, *rest = frame
    assert getattr(desk, kind)(device, *rest) == [Ignore(device, why)]
    desk.activation(0)
    for first_k in range(3):
        desk.differences(0, first_k, 1)
    desk.deliver(1, 2)
    desk.compute_all()
    assert desk.closed[0].contributions == [contribution(0, device) for device in range(3)]


def test_frames_of_a_closed_round_are_late(desk):
    desk.deliver(0, 1, 2)
    desk.compute_all()
    assert desk.activation(0, 0) == [Ignore(0, "late")]
    assert desk.differences(0, 0, 3, 0) == [Ignore(0, "late")]


def test_frames_after_the_end_are_late():
    desk = Desk(rounds=1)
    desk.start()
    desk.deliver(0, 1, 2)
    desk.compute_all()
    assert desk.activation(0, 0) == [Ignore(0, "late")]
    assert desk.activation(0, 1) == [Ignore(0, "late")]


# -- participation


def test_participation_draws_a_seeded_subset_that_changes_by_round():
    def draws(seed):
        desk = Desk(devices=(0, 1, 2, 3, 4), participants=2, rounds=8, run_seed=seed)
        desk.start()
        while desk.machine.finished is None:
            desk.deliver(*desk.actions[-1].participants)
            desk.compute_all()
        return [action.participants for action in desk.actions if isinstance(action, OpenRound)]

    drawn = draws(1)
    assert len(drawn) == 8
    assert all(len(set(some)) == 2 and some == sorted(some) for some in drawn)
    assert set(itertools.chain(*drawn)) == {0, 1, 2, 3, 4}
    assert draws(1) == drawn
    assert draws(2) != drawn


def test_frames_of_a_device_that_was_not_drawn_are_not_asked():
    desk = Desk(participants=2)
    (opened,) = desk.start()
    (resting,) = {0, 1, 2} - set(opened.participants)
    assert desk.activation(resting) == [Ignore(resting, "not asked")]
    desk.deliver(*opened.participants)
    desk.compute_all()
    assert [c.device for c in desk.closed[0].contributions] == opened.participants


# -- values that are not finite


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("work", [Step(1, 0), Step(1, 1), Measure(1, 0)])
def test_a_value_that_is_not_finite_drops_the_device_from_this_round_only(desk, work, poison):
    desk.deliver(1)
    while (piece := desk.machine.next_work()) != work:
        assert desk.compute(piece) == []
    assert desk.compute(work, poison) == []
    assert desk.machine.next_work() is None
    assert desk.activation(1) == [Ignore(1, "late")]
    desk.deliver(0, 2)
    assert desk.compute_all()[-2:] == [
        CloseRound(0, [contribution(0, 0), contribution(0, 2)], {1: "not finite"}, 1000.0),
        OpenRound(1, [0, 1, 2]),
    ]


@pytest.mark.parametrize("directions", [0, 3])
def test_a_tensor_that_is_not_finite_behind_a_good_one_changes_nothing(directions):
    """Not even how long the others are waited for."""
    desk = Desk(directions=directions)
    desk.start()
    desk.deliver(1)
    desk.compute_all()
    for _ in range(3):
        desk.now_s += 40.0
        poisoned = desk.machine.poisoned(1, 0, desk.now_s, activation=True)
        assert poisoned == [Ignore(1, "duplicate")]
    (finish,) = desk.tick(0.0)
    assert finish.outcome is Outcome.STALLED


def lose_round(desk):
    """A round in which every device's first step is not finite."""
    desk.deliver(0, 1, 2)
    actions = []
    for device in range(3):
        actions = desk.compute(Step(device, 0), math.nan)
    return actions


def test_barren_rounds_in_a_row_end_the_run_as_diverged():
    desk = Desk(rounds=20)
    desk.start()
    for number in range(BARREN - 1):
        assert lose_round(desk) == [
            CloseRound(number, [], dict.fromkeys(range(3), "not finite"), 1000.0),
            OpenRound(number + 1, [0, 1, 2]),
        ]
    *_, finish = lose_round(desk)
    assert finish.outcome is Outcome.DIVERGED
    assert desk.machine.finished == finish


def test_one_good_round_starts_the_count_of_barren_rounds_again():
    desk = Desk(rounds=20)
    desk.start()
    for _ in range(BARREN - 1):
        lose_round(desk)
    desk.deliver(0, 1, 2)
    desk.compute_all()
    for _ in range(BARREN - 1):
        lose_round(desk)
    assert desk.machine.finished is None
