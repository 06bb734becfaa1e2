"""The coordinator over time: deadlines, devices that leave, come back and join, and stalls."""

import pytest
from core_support import Desk, client_scalar, server_scalar

from server_node.actions import Finish, Ignore, OpenRound, Outcome, Remind, Reply
from server_node.coordination import BARREN

DEADLINE = {"deadline_s": 5.0, "quorum": 2}


def opened_desk(**changes):
    desk = Desk(**changes)
    desk.start()
    return desk


def contributors(closed):
    return [contribution.device for contribution in closed.contributions]


# -- deadline and quorum


def test_deadline_drops_who_has_not_delivered_once_there_is_a_quorum():
    desk = opened_desk(**DEADLINE)
    desk.deliver(0, 1)
    desk.activation(2)
    desk.compute_all()
    assert desk.machine.wake_s() == 1005.0
    assert desk.tick(4.999) == []
    closed, opened = desk.tick(0.001)
    assert contributors(closed) == [0, 1]
    assert closed.dropped == {2: "deadline"}
    assert opened == OpenRound(1, [0, 1, 2])
    assert desk.differences(2, 0, 3, 0) == [Ignore(2, "late")]


def test_deadline_keeps_a_device_whose_frames_are_here_but_not_computed_yet():
    desk = opened_desk(**DEADLINE)
    desk.deliver(0, 1)
    assert desk.tick(5.0) == []
    assert desk.activation(2) == [Ignore(2, "late")]
    desk.compute_all()
    (closed,) = desk.closed
    assert contributors(closed) == [0, 1]
    assert closed.dropped == {2: "deadline"}


def test_deadline_without_a_quorum_waits_until_there_is_one():
    desk = opened_desk(**DEADLINE)
    desk.deliver(0)
    desk.activation(1)
    desk.compute_all()
    assert desk.tick(5.0) == []
    assert desk.tick(5.0) == []
    desk.differences(1, 0, 3)
    desk.compute_all()
    closed, _ = desk.tick()
    assert contributors(closed) == [0, 1]


def test_deadline_without_a_configured_quorum_needs_one_device():
    desk = opened_desk(deadline_s=5.0)
    assert desk.tick(5.0) == []
    desk.deliver(2)
    desk.compute_all()
    closed, _ = desk.tick()
    assert contributors(closed) == [2]
    assert closed.dropped == {0: "deadline", 1: "deadline"}


def test_no_deadline_waits_for_everybody():
    desk = opened_desk(quorum=1, stall_s=1e9)
    desk.deliver(0, 1)
    desk.compute_all()
    assert desk.tick(1e6) == []
    desk.deliver(2)
    desk.compute_all()
    assert contributors(desk.closed[0]) == [0, 1, 2]


def test_each_round_has_its_own_deadline():
    desk = opened_desk(**DEADLINE)
    desk.now_s += 4.0
    desk.deliver(0, 1, 2)
    desk.compute_all()
    desk.deliver(0, 1)
    desk.compute_all()
    assert desk.tick(4.0) == []
    assert contributors(desk.tick(1.0)[0]) == [0, 1]


def test_a_driver_that_sleeps_until_wake_s_does_not_spin_while_a_quorum_is_missing():
    desk = opened_desk(**DEADLINE)
    desk.deliver(0)
    desk.compute_all()
    desk.tick(5.0)
    assert desk.machine.wake_s() > desk.now_s


# -- leaving, coming back, joining


def test_round_waits_for_a_device_that_left_and_came_back_in_time():
    desk = opened_desk()
    desk.deliver(0, 1)
    desk.compute_all()
    assert desk.left(2) == []
    assert desk.machine.wake_s() == 1010.0
    assert desk.tick(9.999) == []
    assert desk.joined(2) == [Remind(2, 0, [0, 1, 2])]
    assert desk.tick(50.0) == []
    desk.deliver(2)
    desk.compute_all()
    assert contributors(desk.closed[0]) == [0, 1, 2]


def test_device_that_stays_away_is_dropped_and_the_rounds_go_on_without_it():
    desk = opened_desk()
    desk.deliver(0, 1)
    desk.compute_all()
    desk.left(2)
    closed, opened = desk.tick(10.0)
    assert closed.dropped == {2: "left"}
    assert contributors(closed) == [0, 1]
    assert opened == OpenRound(1, [0, 1])
    assert desk.joined(2) == []
    assert desk.activation(2) == [Ignore(2, "not asked")]
    desk.deliver(0, 1)
    assert desk.compute_all()[-1] == OpenRound(2, [0, 1, 2])


def test_leaving_twice_does_not_prolong_the_wait():
    desk = opened_desk()
    desk.left(2)
    desk.tick(6.0)
    desk.left(2)
    desk.tick(4.0)


def test_no_patience_drops_a_device_when_it_leaves():
    desk = opened_desk(rejoin_s=0.0)
    desk.left(2)


def test_device_away_for_a_moment_is_still_drawn_for_the_next_round():
    desk = opened_desk()
    desk.deliver(0, 1, 2)
    desk.left(2)
    assert desk.compute_all()[-1] == OpenRound(1, [0, 1, 2])


def test_complete_share_of_a_device_that_left_is_kept():
    desk = opened_desk()
    desk.deliver(2)
    desk.compute_all()
    desk.left(2)
    desk.tick(50.0)
    desk.deliver(0, 1)
    *_, opened = desk.compute_all()
    assert contributors(desk.closed[0]) == [0, 1, 2]
    assert opened == OpenRound(1, [0, 1])


def test_device_back_too_late_is_told_nothing_of_the_round_it_was_dropped_from():
    desk = opened_desk()
    desk.left(2)
    desk.tick(10.0)
    assert desk.joined(2) == []
    assert desk.activation(2) == [Ignore(2, "late")]


def test_round_that_lost_everybody_opens_again_for_who_comes_back():
    desk = opened_desk()
    desk.deliver(0)
    desk.left(0, 1, 2)
    assert desk.tick(10.0) == []
    assert desk.closed == []
    assert desk.activation(0) == [Ignore(0, "not asked")]
    assert desk.joined(1) == [OpenRound(0, [1])]
    desk.deliver(1)
    *_, closed, opened = desk.compute_all()
    assert closed.contributions == [
        (
            1,
            [client_scalar(0, 1, k) for k in range(3)],
            [[server_scalar(0, 1, i)] for i in (0, 1)],
            0,
        )
    ]
    assert closed.dropped == {}
    assert opened == OpenRound(1, [1])


def test_run_goes_on_when_somebody_comes_back_between_two_rounds():
    """The last device contributes and is gone before the next round can be opened."""
    desk = opened_desk()
    desk.left(1, 2)
    desk.tick(10.0)
    desk.activation(0)
    desk.compute_all()
    desk.differences(0, 0, 3)
    desk.left(0)
    desk.tick(10.0)
    assert desk.machine.finished is None
    (opened,) = desk.joined(0)
    assert opened.participants == [0]
    desk.deliver(0)
    desk.compute_all()
    assert desk.closed[-1].round == opened.round


def test_new_device_takes_part_from_the_next_round():
    desk = opened_desk(participants=4)
    assert desk.joined(7) == []
    assert desk.activation(7) == [Ignore(7, "not asked")]
    desk.deliver(0, 1, 2)
    assert desk.compute_all()[-1] == OpenRound(1, [0, 1, 2, 7])


def test_rounds_lost_to_departures_do_not_count_as_divergence():
    desk = opened_desk(devices=tuple(range(BARREN + 2)), participants=1, rejoin_s=0.0,
                       rounds=100)  # fmt: skip
    for _ in range(BARREN):
        opened = next(a for a in reversed(desk.actions) if isinstance(a, OpenRound))
        desk.left(*opened.participants)
    assert desk.machine.finished is None


# -- what a device in touch again is told


@pytest.mark.parametrize("sent", [[], ["activation"], ["differences"]])
def test_remind_goes_to_a_device_that_still_misses_frames(sent):
    desk = opened_desk()
    if "activation" in sent:
        desk.activation(1)
    if "differences" in sent:
        desk.differences(1, 0, 3)
    assert desk.joined(1) == [Remind(1, 0, [0, 1, 2])]


def test_device_whose_frames_are_all_here_is_told_nothing_until_its_scalars_are():
    desk = opened_desk()
    desk.deliver(1)
    assert desk.joined(1) == []
    desk.compute_all()
    assert desk.joined(1) == [Reply(1, 0, [10.0, 11.0, 12.0])]


# -- stalls


def test_run_without_progress_is_stalled_and_names_who_is_awaited():
    desk = opened_desk()
    desk.deliver(1)
    desk.compute_all()
    assert desk.machine.wake_s() == 1100.0
    assert desk.tick(99.999) == []
    (finish,) = desk.tick(0.001)
    assert isinstance(finish, Finish)
    assert finish.outcome is Outcome.STALLED
    assert "[0, 2]" in finish.detail
    assert desk.machine.wake_s() is None
    assert desk.joined(0) == []


def test_run_that_everybody_left_is_stalled_when_nobody_comes_back():
    desk = opened_desk()
    desk.left(0, 1, 2)
    assert desk.tick(10.0) == []
    assert desk.tick(89.999) == []
    (finish,) = desk.tick(0.001)
    assert finish.outcome is Outcome.STALLED


@pytest.mark.parametrize(
    "event",
    [
        lambda desk: desk.activation(0),
        lambda desk: desk.differences(0, 0, 1),
        lambda desk: desk.joined(7),
        lambda desk: desk.compute(desk.machine.next_work()),
    ],
)
def test_every_sign_of_progress_puts_the_stall_off(event):
    desk = opened_desk()
    desk.activation(1)
    desk.now_s += 60.0
    event(desk)
    assert desk.machine.wake_s() == desk.now_s + 100.0
    assert desk.tick(99.999) == []
    assert desk.tick(0.001)[0].outcome is Outcome.STALLED


def test_useless_frames_do_not_put_the_stall_off():
    desk = opened_desk()
    desk.activation(1)
    desk.now_s += 60.0
    desk.activation(1)
    desk.activation(9)
    desk.differences(1, 2, 5)
    desk.joined(0)  # an idle device repeats itself
    assert desk.machine.wake_s() == 1100.0


def test_a_device_that_comes_and_goes_does_not_put_off_the_stall():
    desk = Desk()
    desk.start()
    for _ in range(14):
        desk.left(0)
        desk.now_s += 9.0  # within rejoin_s
        desk.joined(0)
        desk.tick()
    assert desk.machine.finished is not None
    assert desk.machine.finished.outcome is Outcome.STALLED
