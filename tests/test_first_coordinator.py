"""Pooled and first-order steps and cut gradients in the coordinator: when, for whom, how often."""

import math

import pytest
from core_support import Desk

from server_node.actions import (
    CloseRound,
    Ignore,
    Measure,
    OpenRound,
    Outcome,
    Remind,
    Reply,
    SendGradient,
    Step,
)

SCALARS = [1.0, 2.0, 3.0]


def desk_of(**rules):
    desk = Desk(**rules)
    assert desk.start() == [OpenRound(0, [0, 1, 2])]
    return desk


def answer(desk, device, number=0, scalars=SCALARS):
    return desk.note(desk.machine.derivatives(device, number, scalars, desk.now_s))


def test_the_gradient_is_sent_after_all_steps_and_its_answer_completes_the_device():
    desk = desk_of(cut_gradient=True)
    desk.activation(1)
    assert desk.machine.next_work() == Step(1, 0)
    assert desk.compute(Step(1, 0)) == []
    assert desk.compute(Step(1, 1)) == [SendGradient(1, 0)]
    assert desk.machine.next_work() is None
    assert answer(desk, 1) == [Reply(1, 0, SCALARS)]


def test_repeated_late_early_and_ill_sized_answers_change_nothing():
    desk = desk_of(cut_gradient=True)
    assert answer(desk, 0) == [Ignore(0, "not asked")]  # not stepped for
    desk.activation(0)
    desk.compute_all()
    assert answer(desk, 0, scalars=SCALARS[:2]) == [Ignore(0, "not asked")]
    assert answer(desk, 0, number=1) == [Ignore(0, "not asked")]
    assert answer(desk, 7) == [Ignore(7, "not asked")]
    assert answer(desk, 0) == [Reply(0, 0, SCALARS)]
    assert answer(desk, 0, scalars=[9.0] * 3) == [Ignore(0, "duplicate"), Reply(0, 0, SCALARS)]
    for device in (1, 2):
        desk.activation(device)
        desk.compute_all()
        answer(desk, device)
    assert [c.client_scalars for c in desk.closed[0].contributions] == [SCALARS] * 3
    assert answer(desk, 0) == [Ignore(0, "late")]


def test_a_device_that_asks_again_gets_what_it_misses():
    desk = desk_of(cut_gradient=True)
    assert desk.joined(0) == [Remind(0, 0, [0, 1, 2])]
    desk.activation(0)
    assert desk.joined(0) == []  # it will hear
    desk.compute_all()
    assert desk.joined(0) == [SendGradient(0, 0)]
    assert desk.joined(0) == [SendGradient(0, 0)]
    answer(desk, 0)
    assert desk.joined(0) == [Reply(0, 0, SCALARS)]


def test_a_frozen_client_is_asked_for_no_derivatives():
    desk = desk_of(cut_gradient=True, directions=0)
    desk.activation(0)
    assert desk.compute_all() == [Reply(0, 0, [])]


def test_pooled_steps_wait_for_all_activations_and_belong_to_the_lowest_device():
    desk = desk_of(pooled=True)
    desk.deliver(2, 1)
    assert desk.machine.next_work() is None
    desk.activation(0)
    assert desk.machine.pool == []
    assert desk.machine.next_work() == Step(0, 0)
    assert desk.machine.pool == [0, 1, 2]
    desk.compute(Step(0, 0))
    desk.compute(Step(0, 1))
    assert desk.machine.next_work() == Measure(2, 0)
    desk.differences(0, 0, 3)
    desk.compute_all()
    (closed,) = desk.closed
    assert closed.stepped == [0]
    assert [c.device for c in closed.contributions] == [0, 1, 2]


def test_a_deadline_leaves_the_pool_to_those_that_are_here_and_counts_anew_for_their_answers():
    desk = desk_of(pooled=True, cut_gradient=True, deadline_s=5.0)
    desk.activation(2)
    desk.activation(1)
    assert desk.machine.next_work() is None
    desk.tick(5.0)
    assert desk.compute_all() == [SendGradient(1, 0), SendGradient(2, 0)]
    desk.tick(4.0)
    answer(desk, 2)
    assert desk.closed == []
    (closed, opened) = desk.tick(1.0)
    assert isinstance(closed, CloseRound)
    assert (closed.dropped, closed.stepped) == ({0: "deadline", 1: "deadline"}, [1])
    assert [c.device for c in closed.contributions] == [2]
    assert opened == OpenRound(1, [0, 1, 2])


def test_pooled_steps_that_are_not_finite_drop_everybody():
    desk = desk_of(pooled=True)
    desk.deliver(0, 1, 2)
    assert desk.machine.next_work() == Step(0, 0)
    closed, *_ = desk.compute(Step(0, 0), poison=math.inf)
    assert closed.dropped == dict.fromkeys(range(3), "not finite")
    assert closed.stepped == []


def test_first_order_steps_of_a_device_wait_for_its_differences_and_are_not_interrupted():
    """Its copy is not kept: the differences are measured right behind the steps."""
    desk = desk_of(first_order=True)
    desk.activation(0)
    assert desk.machine.next_work() is None
    desk.deliver(1)
    assert desk.machine.next_work() == Step(1, 0)
    desk.compute(Step(1, 0))
    desk.differences(0, 0, 3)
    works = []
    while (work := desk.machine.next_work()) is not None:
        works.append(work)
        desk.compute(work)
    assert works == [Step(1, 1), Measure(1, 0), Step(0, 0), Step(0, 1), Measure(0, 0)]


def test_in_first_order_the_steps_of_a_device_that_never_answers_count_for_the_server_half():
    desk = desk_of(first_order=True, cut_gradient=True)
    for device in range(3):
        desk.activation(device)
    desk.compute_all()
    answer(desk, 0)
    answer(desk, 1)
    desk.left(2)
    desk.tick(desk.rules.rejoin_s)
    (closed,) = desk.closed
    assert (closed.dropped, closed.stepped) == ({2: "left"}, [0, 1, 2])


@pytest.mark.parametrize("pooled", [False, True])
def test_a_run_ends_however_often_everything_is_repeated(pooled):
    desk = desk_of(first_order=True, cut_gradient=True, pooled=pooled)
    for number in range(desk.rules.rounds):
        for _ in range(2):
            for device in (2, 0, 1):
                desk.activation(device, number)
        desk.compute_all()
        for _ in range(2):
            for device in (1, 2, 0):
                desk.joined(device)
                answer(desk, device, number)
    assert desk.machine.finished.outcome is Outcome.COMPLETE
    assert [len(closed.contributions) for closed in desk.closed] == [3, 3, 3]
