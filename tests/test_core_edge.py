"""The device's step and trainer: what is sent in which order, exact weights, commits, restarts."""

import itertools

import numpy as np
import pytest
import torch
from core_support import play, tiny_config

from edge_client import zo_step as zo_module
from edge_client.bundle import read_bundle
from edge_client.pacing import PacedSession, Pacing
from edge_client.session import ClientSession
from edge_client.shard import Shard
from edge_client.trainer import Trainer
from edge_client.zo_step import Activation, Differences, PhaseClock, zo_step
from emulation.inprocess import InProcessFleet, make_shards
from export.exporter import export_model, load_halves
from export.inputs import SampleArray
from server_node.prepare import prepare
from wire_protocol.directions import (
    DirectionGenerator,
    DirectionId,
    Stream,
    batch_indices,
    directions_digest,
)
from wire_protocol.energy import NoEnergy
from wire_protocol.frames import FrameKind, decode_frame
from wire_protocol.manifest import Transform, sha256
from wire_protocol.messages import Commit, Entry, Welcome

BATCH, DIRECTIONS, LAM = 5, 6, 0.01
TRANSFORM = Transform(mean=[2.0], std=[4.0])
ORIGIN = DirectionId(7, Stream.CLIENT_HALF, 2, 3, 0, 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_model(
        "mlp:9-8-6-4",
        "fc2",
        tmp_path_factory.mktemp("bundle"),
        seed=0,
        arrays=[SampleArray((9,), transform=TRANSFORM)],
    )


@pytest.fixture(scope="module")
def bundle(exported):
    return read_bundle(exported.client)


class Linear:
    """A client half of one line, so that differences can be told by hand: h = x * sum(theta)."""

    def __init__(self, size):
        self.parameters = np.zeros(size, np.float32)
        self._buffers = [np.empty((BATCH, 3), np.float32) for _ in range(2)]
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        self._buffers.reverse()
        np.multiply(x[0], self.parameters.sum(), out=self._buffers[0])
        return self._buffers[0]


def clock():
    ticks = itertools.count()
    return PhaseClock(lambda: float(next(ticks)))


def run_step(session, theta, x, directions=DIRECTIONS, phases=None):
    step = zo_step(
        session, theta, [x], ORIGIN, directions, LAM, DirectionGenerator(), phases or clock()
    )
    return [part and part._replace(tensor=part.tensor.copy()) for part in step]


# -- the step


def test_activation_comes_first_before_any_perturbed_forward():
    session, theta = Linear(10), np.linspace(0, 1, 10, dtype=np.float32)
    x = np.ones((BATCH, 3), np.float32)
    step = zo_step(session, theta, [x], ORIGIN, DIRECTIONS, LAM, DirectionGenerator(), clock())
    first = next(step)
    assert isinstance(first, Activation)
    assert session.forwards == 1
    np.testing.assert_array_equal(first.tensor, x * theta.sum())
    list(step)
    assert session.forwards == 1 + 2 * DIRECTIONS


def test_control_returns_after_every_direction():
    parts = run_step(Linear(10), np.ones(10, np.float32), np.ones((BATCH, 3), np.float32))
    kinds = [type(part) for part in parts]
    assert kinds == [Activation, *[type(None)] * (DIRECTIONS - 1), Differences]


@pytest.mark.parametrize(
    ("activations_per_group", "firsts"),
    [(0.5, [0, 1, 2, 3, 4, 5]), (1, [0, 1, 2, 3, 4, 5]), (2.9, [0, 2, 4]), (4, [0, 4]),
     (6, [0]), (100, [0])],
)  # fmt: skip
def test_differences_come_in_groups_of_about_group_bytes(
    monkeypatch, activations_per_group, firsts
):
    x = np.ones((BATCH, 3), np.float32)
    monkeypatch.setattr(zo_module, "GROUP_BYTES", int(x.nbytes * activations_per_group))
    theta = np.ones(10, np.float32)
    groups = [p for p in run_step(Linear(10), theta, x) if isinstance(p, Differences)]
    assert [group.first_k for group in groups] == firsts
    assert sum(len(group.tensor) for group in groups) == DIRECTIONS
    together = np.concatenate([group.tensor for group in groups])
    monkeypatch.undo()
    (alone,) = [p for p in run_step(Linear(10), theta, x) if isinstance(p, Differences)]
    np.testing.assert_array_equal(together, alone.tensor)


def test_a_frozen_half_sends_its_activation_only():
    session = Linear(10)
    parts = run_step(session, np.ones(10, np.float32), np.ones((BATCH, 3), np.float32), 0)
    assert [type(part) for part in parts] == [Activation]
    assert session.forwards == 1


def test_differences_are_torchs_h_plus_minus_h_minus(exported, bundle):
    module = load_halves(exported.server).client.module
    theta = bundle.initial_parameters()
    x = np.random.default_rng(0).standard_normal((BATCH, 9)).astype(np.float32)
    parts = run_step(ClientSession(bundle, BATCH, 1), theta, x)

    def forward(weights):
        torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), module.parameters())
        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    np.testing.assert_allclose(parts[0].tensor, forward(theta), rtol=0, atol=1e-6)
    differences = parts[-1].tensor
    assert differences.shape == (DIRECTIONS, BATCH, 6)
    for k in range(DIRECTIONS):
        u = DirectionGenerator().signs(ORIGIN._replace(k=k), 0, len(theta))
        want = forward(theta + np.float32(LAM) * u) - forward(theta - np.float32(LAM) * u)
        np.testing.assert_allclose(differences[k], want, rtol=0, atol=1e-6)
        assert np.abs(want).max() > 1e-3


def test_theta_is_never_touched(bundle):
    theta = bundle.initial_parameters()
    theta.flags.writeable = False
    before = theta.tobytes()
    x = np.ones((BATCH, 9), np.float32)
    one = run_step(ClientSession(bundle, BATCH, 1), theta, x)
    session = ClientSession(bundle, BATCH, 1)
    session.parameters += 3.0  # what the session held before does not matter
    other = run_step(session, theta, x)
    assert theta.tobytes() == before
    assert one[0].tensor.tobytes() == other[0].tensor.tobytes()
    assert one[-1].tensor.tobytes() == other[-1].tensor.tobytes()


def test_time_is_accounted_by_phase():
    phases = clock()
    run_step(Linear(10), np.ones(10, np.float32), np.ones((BATCH, 3), np.float32), phases=phases)
    assert phases.perturb_s == 1 + 2 * DIRECTIONS
    assert phases.forward_s >= 1 + 2 * DIRECTIONS
    assert phases.encode_s == 0


# -- the trainer


@pytest.fixture
def trainer(bundle):
    random = np.random.default_rng(1)
    shard = Shard(
        bundle.manifest.inputs[0].name, [random.integers(0, 16, (20, 3, 3), np.uint8)],
        random.integers(0, 4, 20), 0,
    )  # fmt: skip
    welcome = Welcome(
        run=99, run_seed=7, epoch=5, device=2, manifest_sha256=bundle.digest, manifest_bytes=1,
        directions_sha256=directions_digest(7), lam=LAM, batch=BATCH, directions=DIRECTIONS,
        rounds=10, next_round=0, encoding="float32", compression="none",
        feedback="loss_difference", optimiser="sgd", momentum=0.9, beta2=0.999, asynchronous=False,
    )  # fmt: skip
    session = PacedSession(ClientSession(bundle, BATCH, 1), Pacing())
    ticks = itertools.count()
    return Trainer(welcome, session, bundle, shard, lambda: float(next(ticks)))


def commit(number, digest="", device=2, eta_c=0.1):
    scalars = np.linspace(-1e-3, 1e-3, DIRECTIONS, dtype="<f4").tobytes()
    return Commit(99, number, eta_c, 1.0, [Entry(device, 1.0, scalars)], digest)


def frames(trainer, epoch=5):
    return [decode_frame(payload) for payload in trainer.steps(epoch) if payload is not None]


def test_frames_name_their_run_round_and_session_and_labels_come_with_the_activation(trainer):
    first, second = frames(trainer, epoch=5)
    assert (first.kind, second.kind) == (FrameKind.ACTIVATION, FrameKind.DIFFERENCES)
    assert {(f.run, f.epoch, f.round, f.first_k) for f in (first, second)} == {(99, 5, 0, 0)}
    chosen = batch_indices(7, 2, 0, BATCH, 20)
    np.testing.assert_array_equal(first.labels, trainer._shard.y[chosen])
    assert second.labels.size == 0


def test_samples_go_through_the_declared_transform(trainer, bundle):
    chosen = batch_indices(7, 2, 0, BATCH, 20)
    x = (trainer._shard.xs[0][chosen].reshape(BATCH, 9).astype(np.float32) - 2.0) / 4.0
    want = ClientSession(bundle, BATCH, 1).forward([x])
    np.testing.assert_array_equal(frames(trainer)[0].tensor, want)


def test_commit_steps_the_weights_by_its_scalars_in_order(trainer, bundle):
    want = bundle.initial_parameters()
    for k, delta in enumerate(np.linspace(-1e-3, 1e-3, DIRECTIONS, dtype=np.float32).tolist()):
        u = DirectionGenerator().signs(ORIGIN._replace(round=0, k=k), 0, len(want))
        want = want - np.float32(0.1 / (DIRECTIONS * 2 * LAM) * delta) * u
    trainer.apply(commit(0))
    assert trainer.next_round == 1
    np.testing.assert_array_equal(trainer.theta, want)
    assert not np.array_equal(want, bundle.initial_parameters())


def test_a_commit_with_the_right_digest_is_kept(trainer):
    trainer.apply(commit(0))
    digest = sha256(trainer.theta)
    trainer.restore(trainer._bundle.initial_parameters(), 0)
    trainer.apply(commit(0, digest))
    assert (trainer.next_round, sha256(trainer.theta)) == (1, digest)


def test_a_commit_with_another_digest_starts_over_from_the_bundle(trainer, bundle):
    trainer.apply(commit(0))
    trainer.apply(commit(1, "0" * 64))
    assert trainer.next_round == 0
    np.testing.assert_array_equal(trainer.theta, bundle.initial_parameters())
    assert {frame.round for frame in frames(trainer)} == {0}


def test_restore_takes_weights_of_the_right_number_only(trainer):
    saved = np.full_like(trainer.theta, 0.25)
    assert trainer.restore(saved, 4)
    assert trainer.next_round == 4
    saved[...] = 0.0
    assert set(trainer.theta) == {np.float32(0.25)}
    assert not trainer.restore(np.zeros(3, np.float32), 9)
    assert trainer.next_round == 4
    assert set(trainer.theta) == {np.float32(0.25)}


def test_a_restored_trainer_sends_what_one_that_never_stopped_sends(trainer, bundle):
    trainer.apply(commit(0))
    weights = trainer.theta.copy()
    want = [frame.tensor.tobytes() for frame in frames(trainer)]
    trainer.restore(bundle.initial_parameters(), 0)
    assert [frame.tensor.tobytes() for frame in frames(trainer)] != want
    trainer.restore(weights, 1)
    assert [frame.tensor.tobytes() for frame in frames(trainer)] == want


def test_report_has_phases_for_the_round_that_was_computed_and_none_for_another(trainer):
    frames(trainer)
    costs = {"stream": (10, 20), "bundle": (3, 4), "rss": (5, 6), "energy": NoEnergy("no meter")}
    mine = trainer.report(5, 0, 123.0, 0.5, **costs)
    other = trainer.report(5, 1, 123.0, 0.5, **costs)
    assert mine.forward_s > 0
    assert mine.encode_s > 0
    assert mine.started_unix_s == 123.0
    assert (other.forward_s, other.encode_s, other.wait_s, other.started_unix_s) == (0, 0, 0, 0)
    assert (mine.bytes_up, mine.bytes_down, mine.peak_rss_bytes) == (10, 20, 6)


def test_devices_of_a_whole_run_end_with_the_servers_client_weights(tmp_path):
    config = tiny_config()
    experiment = prepare(config, tmp_path)
    run = play(experiment, tmp_path / "run")
    fleet = InProcessFleet(experiment._replace(folder=tmp_path / "again"))
    (tmp_path / "again").mkdir()
    fleet.run()
    digests = {sha256(trainer.theta) for trainer in fleet._trainers}
    assert digests == {sha256(run.client)}
    assert len(fleet._trainers) == len(make_shards(config)) == 3
