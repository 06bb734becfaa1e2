"""The asynchronous mode: the machine through its events, and runs that replay and resume."""

import random
import shutil

import pytest
from core_support import RULES, Desk, client_scalar, play, server_scalar, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from edge_client.commit_queue import own_round
from emulation.inprocess import InProcessFleet
from server_node.actions import (
    CloseRound,
    Contribution,
    Finish,
    Ignore,
    Measure,
    OpenShare,
    Outcome,
    Remind,
    Reply,
    SendGradient,
    Step,
)
from server_node.asynchronous import AsynchronousCoordinator
from server_node.coordination import BARREN
from server_node.errors import ConfigError
from server_node.files import CONTROL_FOLDER
from server_node.journal import RoundClosed, Share, read_journal
from server_node.prepare import prepare
from server_node.replay import client_commit, replay
from server_node.resume import read_past, rebuild
from server_node.schedule import staleness_weight
from wire_protocol.manifest import sha256
from wire_protocol.messages import Entry


class AsyncDesk(Desk):
    """A desk whose machine is asynchronous; scalars name the version they were drawn at."""

    def __init__(self, devices=(0, 1, 2), **changes):
        super().__init__(devices, staleness_limit=changes.pop("staleness_limit", 1000), **changes)
        self.machine = AsynchronousCoordinator(self.rules, list(devices), self.now_s)

    def deliver(self, device, version):
        actions = self.activation(device, version)
        if self.rules.directions:
            actions += self.differences(device, 0, self.rules.directions, version)
        return actions

    def compute(self, work, poison=None):
        version = self.machine.version(work.device)
        if isinstance(work, Measure):
            count = self.groups[version, work.device, work.first_k]
            last = work.first_k + count
            scalars = [client_scalar(version, work.device, k) for k in range(work.first_k, last)]
            act = self.machine.measured
            first = (work.first_k,)
        else:
            scalars = [server_scalar(version, work.device, work.step)]
            act, first = self.machine.stepped, ()
        scalars[0] = scalars[0] if poison is None else poison
        return self.note(act(work.device, *first, scalars, self.now_s))

    def joined(self, device, next_round):
        return self.note(self.machine.joined(device, next_round, self.now_s))


def contribution(version, device, staleness, tau=RULES.tau, directions=RULES.directions):
    return Contribution(
        device,
        [client_scalar(version, device, k) for k in range(directions)],
        [[server_scalar(version, device, step)] for step in range(tau)],
        staleness,
    )


@pytest.fixture
def desk():
    desk = AsyncDesk(rounds=9)
    assert desk.start() == [OpenShare(device, 0) for device in (0, 1, 2)]
    return desk


def test_every_contribution_is_a_commit_and_its_device_goes_on_when_it_is_ready(desk):
    assert desk.deliver(1, 0) == []
    assert desk.compute_all() == [
        Reply(1, 0, [10.0, 11.0, 12.0]),
        CloseRound(0, [contribution(0, 1, 0)], {}, 1000.0),
    ]
    desk.deliver(0, 0)
    assert desk.compute_all()[1] == CloseRound(1, [contribution(0, 0, 1)], {}, 1000.0)
    assert desk.joined(1, 2) == [OpenShare(1, 2)]
    desk.deliver(1, 2)
    assert desk.compute_all()[1] == CloseRound(2, [contribution(2, 1, 0)], {}, 1000.0)


def test_nothing_comes_between_the_first_step_and_the_last_scalar(desk):
    desk.activation(0, 0)
    assert desk.machine.next_work() is None
    desk.differences(0, 0, 2, 0)
    desk.differences(0, 2, 1, 0)
    desk.deliver(1, 0)
    order = []
    while (work := desk.machine.next_work()) is not None:
        order.append(work)
        desk.compute(work)
    assert order == [
        Step(0, 0), Step(0, 1), Measure(0, 0), Measure(0, 2), Step(1, 0), Step(1, 1), Measure(1, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("first_order", [False, True])
def test_an_answer_that_comes_while_others_are_stepped_is_committed_behind_them(first_order):
    """A commit between two steps would give them two bases."""
    desk = AsyncDesk((0, 1), rounds=9, cut_gradient=True, first_order=first_order)
    desk.start()
    told = [1.0, 2.0, 3.0]
    for device in (0, 1):
        desk.activation(device, 0)
    while not any(isinstance(action, SendGradient) for action in desk.actions):
        desk.compute(desk.machine.next_work())
    desk.compute(desk.machine.next_work())
    assert desk.machine.derivatives(0, 0, told, desk.now_s) == []
    assert desk.machine.joined(0, 0, desk.now_s) == []  # its answer is here
    *_, last = actions = desk.compute(desk.machine.next_work())
    assert SendGradient(1, 0) in actions
    assert Reply(0, 0, told) in actions
    commits = [action for action in actions if isinstance(action, CloseRound)]
    assert last is commits[-1]
    assert [c.stepped for c in commits] == ([[1], []] if first_order else [None])
    assert commits[-1].contributions[0].staleness == commits[-1].round
    if first_order:  # its steps were made on the weights before the first device's
        assert [c.staleness for c in commits] == [1, 0]


def test_frames_of_another_version_and_duplicates_are_ignored(desk):
    assert desk.activation(0, 1) == [Ignore(0, "not asked")]
    assert desk.activation(7, 0) == [Ignore(7, "late")]
    desk.deliver(0, 0)
    assert desk.deliver(0, 0) == [Ignore(0, "duplicate")] * 2
    desk.compute_all()
    assert desk.deliver(0, 0) == [Ignore(0, "late")] * 2


def test_a_device_that_asks_again_is_reminded_until_its_frames_are_here(desk):
    assert desk.machine.computing(0, 0)
    assert desk.joined(0, 0) == [Remind(0, 0, [0])]
    desk.deliver(0, 0)
    assert desk.joined(0, 0) == []


def test_a_device_with_newer_weights_than_its_work_gets_new_work(desk):
    for device in (1, 2):
        desk.deliver(device, 0)
    desk.compute_all()
    assert not desk.machine.computing(0, 2)
    assert desk.joined(0, 2) == [OpenShare(0, 2)]
    assert desk.activation(0, 0) == [Ignore(0, "late")]


def test_a_contribution_beyond_the_limit_is_dropped_and_its_device_begins_anew():
    desk = AsyncDesk(devices=(0, 1), participants=2, rounds=9, staleness_limit=2)
    desk.start()
    for version in range(2):
        desk.deliver(0, version)
        assert OpenShare(1, version + 1) not in desk.compute_all()
        desk.joined(0, version + 1)
    desk.deliver(0, 2)
    assert OpenShare(1, 3) in desk.compute_all()
    desk.joined(0, 3)
    desk.deliver(1, 3)
    assert desk.compute_all()[1] == CloseRound(3, [contribution(3, 1, 0)], {1: "stale"}, 1000.0)


def test_fewer_devices_than_there_are_take_turns():
    desk = AsyncDesk(participants=1, rounds=40)
    opened = desk.start()
    seen = set()
    while desk.machine.finished is None:
        ((device, version),) = opened
        seen.add(device)
        desk.deliver(device, version)
        opened = [action for action in desk.compute_all() if isinstance(action, OpenShare)]
        desk.joined(device, version + 1)
    assert seen == {0, 1, 2}
    assert len(desk.closed) == 40


def test_a_device_that_stays_away_loses_its_work_and_the_others_go_on():
    desk = AsyncDesk(participants=1, rounds=9)
    ((device, _),) = desk.start()
    assert desk.left(device) == []
    assert desk.tick(9.0) == []
    ((other, _),) = desk.tick(1.0)
    assert other != device
    assert desk.joined(device, 0) == []


def test_what_was_delivered_counts_though_the_device_left(desk):
    desk.deliver(0, 0)
    desk.left(0)
    desk.tick(10.0)
    assert desk.compute_all()[1].contributions == [contribution(0, 0, 0)]


def test_without_progress_the_run_stalls(desk):
    desk.tick(99.0)
    (finish,) = desk.tick(1.0)
    assert finish.outcome is Outcome.STALLED
    assert "devices [0, 1, 2]" in finish.detail


def test_scalars_that_are_never_finite_end_the_run(desk):
    for _ in range(BARREN):
        desk.deliver(0, 0)
        actions = desk.compute(desk.machine.next_work(), float("nan"))
    assert actions[-1].outcome is Outcome.DIVERGED
    assert desk.closed == []


def poison(desk, device, version):
    return desk.note(desk.machine.poisoned(device, version, desk.now_s, activation=True))


def test_a_device_whose_tensors_are_not_finite_waits_for_the_next_commit(desk):
    for _ in range(2 * BARREN):
        poison(desk, 1, 0)  # the first gives its share up, the others are late
        assert desk.joined(1, 0) == []
    assert desk.machine.finished is None
    desk.deliver(0, 0)
    actions = desk.compute_all()
    assert OpenShare(1, 1) in actions
    assert desk.closed[0].dropped == {1: "not finite"}


def test_when_no_device_has_finite_tensors_the_run_has_diverged(desk):
    assert poison(desk, 0, 0) == []
    assert poison(desk, 2, 0) == []
    (finish,) = poison(desk, 1, 0)
    assert finish.outcome is Outcome.DIVERGED


def test_adaptive_steps_end_when_the_next_device_is_here():
    desk = AsyncDesk(devices=(0, 1), participants=2, rounds=9, tau_cap=50)
    desk.start()
    desk.machine.tau.arrived(1, 2.0)
    desk.deliver(0, 0)
    for _ in range(12):
        desk.now_s += 0.1
        desk.machine.step_took(0.1)
        desk.compute(Step(0, 0))
    assert desk.machine.next_work() == Step(0, 12)
    desk.deliver(1, 0)
    desk.compute_all()
    assert [len(c.contributions[0].server_scalars) for c in desk.closed] == [13, RULES.tau]


# -- whatever happens


class AnythingHappens(RuleBasedStateMachine):
    """Devices 0..3 are there from the start, device 4 may join; the driver does as it is told."""

    @initialize(
        participants=st.integers(1, 5), directions=st.integers(0, 3), tau=st.integers(1, 3),
        tau_cap=st.sampled_from([0, 6]), rejoin_s=st.sampled_from([0.0, 10.0]),
        staleness_limit=st.sampled_from([5, 1000]),
    )  # fmt: skip
    def open(self, **rules):
        self.desk = AsyncDesk(devices=(0, 1, 2, 3), rounds=12, **rules)
        self.open_at, self.done, self.begun = {}, set(), None
        self.check(self.desk.start())

    @rule(device=st.integers(0, 4), past=st.sampled_from([0, 0, 0, 1, -1]))
    def everything(self, device, past):
        version = max(0, self.open_at.get(device, 0) - past)
        self.check(self.desk.activation(device, version))
        for k in range(self.desk.rules.directions):
            self.check(self.desk.differences(device, k, 1, version))

    @rule(times=st.integers(1, 12), poison=st.sampled_from([None, None, None, float("nan")]))
    def compute(self, times, poison):
        for _ in range(times):
            work = self.desk.machine.next_work()
            if work is None:
                return
            assert self.begun in (None, work.device)
            self.begun = work.device
            self.desk.machine.step_took(0.1)
            actions = self.desk.compute(work, poison)
            if actions:
                self.begun = None
            self.check(actions)
            if poison is not None:
                self.begun = None

    @rule(device=st.integers(0, 4))
    def leave(self, device):
        self.check(self.desk.left(device))

    @rule(device=st.integers(0, 4), behind=st.sampled_from([0, 0, 1]))
    def join(self, device, behind):
        self.check(self.desk.joined(device, max(0, self.desk.machine.round - behind)))

    @rule(seconds=st.sampled_from([0.0, 0.5, 4.0, 9.0, 40.0]))
    def wait(self, seconds):
        self.check(self.desk.tick(seconds))

    def check(self, actions):
        for action in actions:
            match action:
                case OpenShare():
                    assert (action.device, action.round) not in self.done
                    assert action.round >= self.open_at.get(action.device, 0)
                    self.open_at[action.device] = action.round
                case CloseRound():
                    self.closed(action)
                case Remind():
                    assert action.round == self.open_at[action.device]
                case Reply() | Ignore() | Finish():
                    pass

    def closed(self, action):
        assert action.round == len(self.desk.closed) - 1
        ((device, client, server, staleness),) = action.contributions
        version = action.round - staleness
        assert version == self.open_at[device]
        assert 0 <= staleness <= self.desk.rules.staleness_limit
        self.done.add((device, version))
        directions, rules = self.desk.rules.directions, self.desk.rules
        assert client == [client_scalar(version, device, k) for k in range(directions)]
        assert server == [[server_scalar(version, device, i)] for i in range(len(server))]
        assert rules.tau <= len(server) <= max(rules.tau, rules.tau_cap)


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True, database=None
)


# -- runs


@given(
    staleness=st.integers(0, 5000), power=st.floats(0, 10), participants=st.integers(1, 100)
)  # fmt: skip
def test_as_many_fresh_contributions_as_devices_weigh_one_and_stale_ones_less(
    staleness, power, participants
):
    weight = staleness_weight(staleness, power, participants)
    assert staleness_weight(0, power, participants) == 1.0 / participants
    assert 0.0 <= weight <= 1.0 / participants


@pytest.mark.parametrize(
    ("staleness", "power", "want"),
    [(0, 0.5, 0.25), (3, 0.5, 0.125), (3, 1.0, 0.0625), (9, 0, 0.25)],
)
def test_staleness_weights(staleness, power, want):
    assert staleness_weight(staleness, power, 4) == want


def test_first_order_steps_of_a_stale_device_count_less(tmp_path):
    """With cut gradients they are a commit of their own."""
    config = tiny_config(
        "round.mode=asynchronous", "method.server_order=first", "method.feedback=cut_gradient",
        "run.rounds=20",
    )  # fmt: skip
    play(prepare(config, tmp_path / "run"), tmp_path / "played")
    journal = read_journal(tmp_path / "played" / "journal.bin")
    shares = [s for r in journal.records if isinstance(r, RoundClosed) for s in r.shares]
    stepped = [share for share in shares if share.server_steps]
    assert {share.staleness for share in stepped} > {0}
    for share in stepped:
        power, devices = config.round.staleness_power, config.participants
        assert share.server_weight == staleness_weight(share.staleness, power, devices)


def test_a_share_that_a_guard_gave_no_weight_is_told_to_its_device():
    shares = [Share(3, 0.0, b"1234", 0.5, b"", 1, 2), Share(4, 0.0, b"", 0.5, b"", 1, 0, 2)]
    commit = client_commit(1, RoundClosed(5, 0.1, 0.1, 1.0, shares))
    assert commit.entries == [Entry(3, 0.0, b"", 2)]
    assert own_round(commit, 3) == 3


@pytest.fixture(scope="module")
def config():
    return tiny_config(
        "round.mode=asynchronous", "run.rounds=12", "evaluation.control=false",
        "method.directions_server=2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a whole run, and its digests; devices deliver in the order of opening."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = InProcessFleet(prepare(config, folder)).run()
    return folder, (sha256(run.client), sha256(run.server))


def shares(folder):
    records = read_journal(folder / "journal.bin").records
    return [(r.round, *r.shares) for r in records if isinstance(r, RoundClosed)]


def test_a_run_replays_to_its_bits_and_journals_one_share_a_commit(whole):
    folder, digests = whole
    result = replay(folder, folder)
    assert (result.client_sha256, result.server_sha256) == digests
    assert result.matches is True
    found = [(number, share.device, share.staleness) for number, share in shares(folder)]
    assert found[:6] == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 0, 2), (4, 1, 2), (5, 2, 2)]
    weights = {share.staleness: share.weight for _, share in shares(folder)}
    assert weights[2] == pytest.approx(3**-0.5 / 3)


@pytest.mark.parametrize(
    "overrides",
    [("method.tau_mode=adaptive", "method.tau_cap=9"), ("devices.participants=2",),
     ("method.client_optimiser=adam",)],
)  # fmt: skip
def test_any_order_of_arrival_replays(config, tmp_path, overrides):
    config = tiny_config("round.mode=asynchronous", "run.rounds=12", *overrides)
    experiment = prepare(config, tmp_path)
    run = play(experiment, tmp_path / "run", random.Random(4))
    result = replay(tmp_path / "run", tmp_path)
    assert result.matches is True
    assert result.client_sha256 == sha256(run.client_state)
    control = play(experiment, tmp_path / "frozen", random.Random(4), frozen=True)
    result = replay(tmp_path / "frozen" / CONTROL_FOLDER, tmp_path)
    assert (result.matches, result.rounds) == (True, 12)
    assert sha256(control.client) == sha256(experiment.client.initial_parameters())


def test_a_resumed_run_goes_on_and_replays(config, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    path = folder / "journal.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    past = read_past(folder)
    assert past is not None
    assert 0 < len(past.rounds) < 12
    experiment = prepare(config, folder, past)
    history = rebuild(past, experiment.client.initial_parameters(), experiment.server_weights)
    run = InProcessFleet(experiment).run(history=history)
    result = replay(folder, folder)
    assert (result.matches, result.rounds, result.complete) == (True, 12, True)
    assert (result.client_sha256, result.server_sha256) == (sha256(run.client), sha256(run.server))


@pytest.mark.parametrize(
    ("override", "field"),
    [("round.deadline_s=5.0", "round.quorum, round.deadline_s"),
     ("round.staleness_limit=2", "round.staleness_limit: 2 is below the 3 devices"),
     ("server.replicas=2", "server.replicas"), ("method.server_batch=pooled", "server_batch")],
)  # fmt: skip
def test_what_makes_no_sense_without_a_barrier_is_refused(override, field):
    with pytest.raises(ConfigError, match=field):
        tiny_config("round.mode=asynchronous", override)
