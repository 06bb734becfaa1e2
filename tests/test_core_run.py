"""Whole runs in this process: determinism, the frozen control, and frames that do not fit."""

import json
import random

import numpy as np
import pytest
from core_support import play, tiny_config

from server_node.actions import Outcome
from server_node.errors import FrameFaultError, NotFiniteError
from server_node.journal import RoundClosed, read_journal
from server_node.prepare import open_run, prepare
from wire_protocol.frames import Frame, FrameKind
from wire_protocol.manifest import sha256
from wire_protocol.messages import Commit, Round

NO_LABELS = np.empty(0, np.uint32)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return prepare(tiny_config(), tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def digests(experiment, tmp_path_factory):
    """Both digests of the run in its own order of arrival."""
    return digests_of(play(experiment, tmp_path_factory.mktemp("runs") / "first"))


def digests_of(run):
    assert run.finished.outcome is Outcome.COMPLETE
    return sha256(run.client), sha256(run.server)


def rounds_of(run):
    records = read_journal(run.ledger.folder / "journal.bin").records
    return [record for record in records if isinstance(record, RoundClosed)]


def with_config(experiment, *overrides):
    """The same exported halves under another configuration."""
    return experiment._replace(config=tiny_config(*overrides))


def test_the_same_seed_gives_the_same_bits(experiment, digests, tmp_path):
    assert digests_of(play(experiment, tmp_path / "again")) == digests


def test_a_new_export_of_the_same_seed_gives_the_same_bits(digests, tmp_path):
    again = prepare(tiny_config(), tmp_path)
    assert digests_of(play(again, tmp_path / "run")) == digests


@pytest.mark.parametrize("order", range(5))
def test_the_order_of_arrival_does_not_change_the_bits(experiment, digests, tmp_path, order):
    run = play(experiment, tmp_path / "run", random.Random(order))
    assert digests_of(run) == digests


def test_another_run_seed_gives_other_bits_on_the_same_weights(experiment, digests, tmp_path):
    run = play(with_config(experiment, "run.seed=1"), tmp_path / "run")
    assert all(a != b for a, b in zip(digests_of(run), digests, strict=True))


@pytest.mark.parametrize(
    "override",
    ["method.directions_server=2", "method.tau=3", "data.alpha=0.5", "devices.participants=2",
     "method.eta_g=0.5", "method.schedule=constant"],
)  # fmt: skip
def test_every_setting_of_the_method_reaches_the_run_and_replays_in_any_order(
    experiment, digests, tmp_path, override
):
    changed = with_config(experiment, override)
    one = play(changed, tmp_path / "one")
    other = play(changed, tmp_path / "other", random.Random(0))
    assert digests_of(one) == digests_of(other) != digests


def test_server_scalars_are_tau_steps_of_k_directions_for_each_device(experiment, tmp_path):
    run = play(
        with_config(experiment, "method.directions_server=2", "method.tau=3"), tmp_path / "run"
    )
    for record in rounds_of(run):
        assert [share.device for share in record.shares] == [0, 1, 2]
        assert all(share.weight == 1 / 3 for share in record.shares)
        assert all(len(share.server_scalars) == 4 * 3 * 2 for share in record.shares)
        assert all(len(share.client_scalars) == 4 * 3 for share in record.shares)
    assert run.ledger.server_steps == 3 * 3 * 3


def test_partial_participation_weighs_by_the_contributions_of_the_round(experiment, tmp_path):
    run = play(with_config(experiment, "devices.participants=2"), tmp_path / "run")
    for record in rounds_of(run):
        assert [share.weight for share in record.shares] == [0.5, 0.5]


def test_frozen_run_leaves_the_client_half_alone_and_asks_for_no_directions(experiment, tmp_path):
    run = play(experiment, tmp_path / "run", frozen=True)
    initial = experiment.client.initial_parameters()
    assert run.terms.directions == 0
    assert run.client.tobytes() == initial.tobytes()
    assert not np.array_equal(run.server, experiment.server_weights)
    assert all(share.client_scalars == b"" for r in rounds_of(run) for share in r.shares)
    assert (run.ledger.folder.name, run.rounds_closed) == ("control", 3)


def test_metrics_have_one_row_a_round_and_scores_where_they_are_due(experiment, tmp_path):
    run = play(experiment, tmp_path / "run")
    lines = (run.ledger.folder / "rounds.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["contributions"] for row in rows] == [3, 3, 3]
    assert [row["accuracy"] is None for row in rows] == [True, False, False]
    assert rows[-1]["accuracy"] == run.scores.accuracy
    with np.load(run.ledger.folder / "checkpoint.npz") as checkpoint:
        assert checkpoint["client"].tobytes() == run.client.tobytes()
        assert checkpoint["server"].tobytes() == run.server.tobytes()
        assert checkpoint["next_round"] == 3


@pytest.mark.parametrize("step", ["method.eta_s=1e30", "method.eta_c=1e30"])
def test_steps_that_are_far_too_large_end_the_run_as_diverged(experiment, tmp_path, step):
    run = play(with_config(experiment, step, "run.rounds=20"), tmp_path / "run")
    assert run.finished.outcome is Outcome.DIVERGED


# -- frames from outside


class Outbox:
    """Keeps what a run broadcasts."""

    def __init__(self):
        self.broadcasts = []

    def broadcast(self, message):
        self.broadcasts.append(message)

    def send(self, device, message):
        pass


@pytest.fixture
def started(experiment, tmp_path):
    """A run that waits for the frames of round 0, and its outbox."""
    outbox = Outbox()
    run = open_run(
        experiment._replace(folder=tmp_path), frozen=False, devices=[(0, "a"), (1, "b"), (2, "c")],
        outbox=outbox, notify=lambda _: None,
    )  # fmt: skip
    run.start([0, 1, 2])
    yield run, outbox
    run.close("test")


def activation(shape=(8, 12), labels=8, label=9, value=0.5):
    return Frame(
        FrameKind.ACTIVATION, 1, 0, 0, 0, np.full(shape, value, np.float32),
        np.full(labels, label, np.uint32),
    )  # fmt: skip


def differences(shape=(3, 8, 12), first_k=0, value=0.001, labels=NO_LABELS):
    return Frame(FrameKind.DIFFERENCES, 1, 0, 0, first_k, np.full(shape, value, np.float32), labels)


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (activation(shape=(8, 13)), "shape"),
        (activation(shape=(7, 12)), "shape"),
        (activation(shape=(8, 12, 1)), "shape"),
        (activation(shape=(96,)), "shape"),
        (activation(labels=7), "7 labels"),
        (activation(labels=0), "0 labels"),
        (activation(label=10), "label 10"),
        (activation(label=(1 << 32) - 1), "label 4294967295"),
        (differences(shape=(3, 8, 13)), "shape"),
        (differences(shape=(8, 12)), "shape"),
        (differences(shape=(0, 8, 12)), "shape"),
        (differences(labels=np.zeros(8, np.uint32)), "8 labels"),
    ],
)
def test_frame_that_does_not_fit_is_refused_and_costs_its_sender_the_message_only(
    started, frame, what
):
    run, outbox = started
    with pytest.raises(FrameFaultError, match=what):
        run.frame(1, frame)
    assert not run.work()
    for device in range(3):
        run.frame(device, activation())
        run.frame(device, differences())
    while run.work():
        pass
    kinds = [type(message) for message in outbox.broadcasts]
    assert kinds == [Round, Commit, Round]
    assert [entry.device for entry in outbox.broadcasts[1].entries] == [0, 1, 2]


@pytest.mark.parametrize(
    "frames",
    [
        [activation(value=np.nan)],
        [activation(value=-np.inf)],
        [activation(), differences(value=np.inf)],
    ],
)
def test_a_tensor_that_is_not_finite_costs_its_sender_the_round_only(started, frames):
    run, outbox = started
    *before, bad = frames
    for frame in before:
        run.frame(1, frame)
        run.work()
    with pytest.raises(NotFiniteError, match="not finite"):
        run.frame(1, bad)
    for device in (1, 0, 2):  # 1 once more: too late
        run.frame(device, activation())
        run.frame(device, differences())
    while run.work():
        pass
    assert [type(message) for message in outbox.broadcasts] == [Round, Commit, Round]
    assert [entry.device for entry in outbox.broadcasts[1].entries] == [0, 2]
    assert outbox.broadcasts[2].participants == [0, 1, 2]


def test_a_tensor_that_is_not_finite_after_all_frames_changes_nothing(started):
    run, outbox = started
    run.frame(1, activation())
    run.frame(1, differences())
    with pytest.raises(NotFiniteError):
        run.frame(1, activation(value=np.nan))
    for device in (0, 2):
        run.frame(device, activation())
        run.frame(device, differences())
    while run.work():
        pass
    assert [entry.device for entry in outbox.broadcasts[1].entries] == [0, 1, 2]


def test_last_class_and_one_direction_a_frame_are_welcome(started):
    run, outbox = started
    for device in range(3):
        run.frame(device, activation(label=9))
        for k in (2, 0, 1):
            run.frame(device, differences(shape=(1, 8, 12), first_k=k))
    while run.work():
        pass
    assert run.rounds_closed == 1
    assert len(outbox.broadcasts[1].entries[0].scalars) == 4 * 3
