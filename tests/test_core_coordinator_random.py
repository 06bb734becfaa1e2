"""The coordinator under random interleavings of everything that can happen to it."""

import random

from core_support import Desk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from server_node.actions import CloseRound, Finish, Ignore, OpenRound, Outcome, Remind, Reply, Step

DEVICES = st.integers(0, 4)
SETTINGS = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True, database=None
)


class AnythingHappens(RuleBasedStateMachine):
    """Devices 0..3 are there from the start, device 4 may join; the driver does as it is told."""

    @initialize(
        participants=st.integers(1, 5), directions=st.integers(0, 3), tau=st.integers(1, 3),
        deadline_s=st.sampled_from([0.0, 5.0]), quorum=st.integers(0, 2),
        rejoin_s=st.sampled_from([0.0, 10.0]), replicas=st.integers(1, 3),
    )  # fmt: skip
    def open(self, **rules):
        self.open_round = None
        self.last_closed = -1
        self.desk = Desk(devices=(0, 1, 2, 3), rounds=6, **rules)
        self.check(self.desk.start())

    @rule(device=DEVICES, past=st.sampled_from([0, 0, 0, 1, -1]))
    def activation(self, device, past):
        self.check(self.desk.activation(device, max(0, self.desk.machine.round - past)))

    @rule(device=DEVICES, first_k=st.integers(0, 3), count=st.integers(1, 3))
    def differences(self, device, first_k, count):
        self.check(self.desk.differences(device, first_k, count))

    @rule(device=DEVICES)
    def everything(self, device):
        self.check(self.desk.activation(device))
        for k in range(self.desk.rules.directions):
            self.check(self.desk.differences(device, k, 1))

    @rule(times=st.integers(1, 12), poison=st.sampled_from([None, None, None, float("nan")]))
    def compute(self, times, poison):
        for _ in range(times):
            work = self.desk.machine.next_work()
            pieces = self.desk.machine.batch(work) if isinstance(work, Step) else [work]
            for piece in pieces if work else []:
                self.check(self.desk.compute(piece, poison))

    @rule(device=DEVICES)
    def leave(self, device):
        self.check(self.desk.left(device))

    @rule(device=DEVICES)
    def join(self, device):
        self.check(self.desk.joined(device))

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 9.0, 40.0]))
    def wait(self, seconds):
        self.check(self.desk.tick(seconds))

    @rule()
    def wait_until_just_before_something_is_due(self):
        wake_s = self.desk.machine.wake_s()
        assert (wake_s is None) == (self.desk.machine.finished is not None)
        if wake_s is not None and wake_s - 1e-3 > self.desk.now_s:
            self.desk.now_s = wake_s - 1e-3
            assert self.desk.tick() == []

    def check(self, actions):
        for action in actions:
            match action:
                case OpenRound():
                    self.opened(action)
                case CloseRound():
                    self.closed(action)
                case Reply() | Remind():
                    assert action.round == self.open_round.round
                    assert action.device in self.open_round.participants
                case Ignore() | Finish():
                    pass

    def opened(self, action):
        assert self.desk.machine.finished is None
        assert action.round == self.last_closed + 1
        assert action.participants == sorted(set(action.participants))
        assert 1 <= len(action.participants) <= self.desk.rules.participants
        self.open_round = action

    def closed(self, action):
        assert action.round == self.open_round.round == self.last_closed + 1
        self.last_closed = action.round
        devices = [contribution.device for contribution in action.contributions]
        assert devices == sorted(set(devices))
        assert sorted(devices + list(action.dropped)) == self.open_round.participants
        for contribution in action.contributions:
            assert len(contribution.client_scalars) == self.desk.rules.directions
            assert len(contribution.server_scalars) == self.desk.rules.tau


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = SETTINGS


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32), devices=st.integers(1, 5), participants=st.integers(1, 5))
def test_without_departures_every_round_is_complete_whatever_the_order(seed, devices, participants):
    shuffle = random.Random(seed)
    desk = Desk(devices=tuple(range(devices)), participants=participants)
    desk.start()
    while desk.machine.finished is None:
        opened = next(a for a in reversed(desk.actions) if isinstance(a, OpenRound))
        frames = [(d, k) for d in opened.participants for k in (None, 0, 1, 2)]
        frames += shuffle.choices(frames, k=3)
        shuffle.shuffle(frames)
        for device, k in frames:
            if k is None:
                desk.activation(device, opened.round)
            else:
                desk.differences(device, k, 1, opened.round)
            if shuffle.random() < 0.5 and (work := desk.machine.next_work()):
                desk.compute(work)
            desk.tick(shuffle.random())
        desk.compute_all()
    assert desk.machine.finished.outcome is Outcome.COMPLETE
    assert [closed.round for closed in desk.closed] == [0, 1, 2]
    drawn = [action.participants for action in desk.actions if isinstance(action, OpenRound)]
    assert [[c.device for c in closed.contributions] for closed in desk.closed] == drawn
