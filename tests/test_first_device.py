"""The device's side of the cut gradient, and what server and device refuse of each other."""

import numpy as np
import pytest
from core_support import tiny_config

from edge_client.agent import Agent
from edge_client.bundle import read_bundle
from edge_client.power.source import NoSource
from edge_client.settings import AgentSettings
from edge_client.shard import Shard
from edge_client.state import StateStore
from emulation.inprocess import InProcessFleet
from server_node.errors import FrameFaultError
from server_node.prepare import open_run, prepare
from wire_protocol.directions import directions_digest
from wire_protocol.frames import Frame, FrameKind, decode_frame, encode_frame
from wire_protocol.messages import (
    Derivatives,
    End,
    Ready,
    Round,
    Scalars,
    Welcome,
    decode_up,
    encode,
)
from wire_protocol.mqtt import Connected, Received

BATCH, K = 8, 5
NO_LABELS = np.empty(0, np.uint32)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    config = tiny_config(
        "method.feedback=cut_gradient", f"method.directions_client={K}", "evaluation.control=false"
    )
    return prepare(config, tmp_path_factory.mktemp("run"))


def welcome(bundle, **changes):
    fields = {
        "run": 1, "run_seed": 0, "epoch": 5, "device": 0, "manifest_sha256": bundle.digest,
        "manifest_bytes": 1, "directions_sha256": directions_digest(0), "lam": 1e-3,
        "batch": BATCH, "directions": K, "rounds": 3, "encoding": "float32",
        "compression": "none", "next_round": 0, "feedback": "cut_gradient", "optimiser": "sgd",
        "momentum": 0.9, "beta2": 0.999, "asynchronous": False,
    }  # fmt: skip
    return Welcome(**{**fields, **changes})


def gradient(scale=1.0, **changes):
    tensor = np.full((BATCH, 12), scale, np.float32)
    frame = Frame(FrameKind.CUT_GRADIENT, 1, 5, 0, 0, tensor, NO_LABELS)
    return encode_frame(frame._replace(**changes))


class Script:
    """A link on which these payloads arrive, one whenever the device has nothing to compute."""

    bytes_up = bytes_down = backlog = 0

    def __init__(self, payloads):
        self._events = [Connected(), *(Received("t", payload) for payload in payloads)]
        self.sent = []

    def publish(self, topic, payload):
        self.sent.append(decode_frame(payload) if topic.endswith("frame") else decode_up(payload))

    def next_event(self, timeout_s):
        return None if timeout_s == 0.0 else self._events.pop(0)


@pytest.fixture
def device(experiment, tmp_path):
    """Answers to payloads: what the device sent, and what it said."""
    folder = experiment.exported.client
    shard = Shard(tmp_path, [np.arange(20 * 64.0).reshape(20, 64) % 7], np.arange(20) % 10, 0)

    def play(*payloads, **changes):
        said = []
        first = encode(welcome(read_bundle(folder), **changes))
        link = Script([first, *payloads, encode(End(1, True, "complete"))])
        store = StateStore(tmp_path / f"state-{np.random.default_rng().integers(1 << 60)}")
        settings = AgentSettings("d", "lab", bundle=folder)
        Agent(settings, 5, shard, store, link, said.append, NoSource("no meter")).run()
        store.close()
        return link.sent, said

    return play


def of(kind, sent):
    return [message for message in sent if isinstance(message, kind)]


ROUND = encode(Round(1, 0, [0]))


def test_the_device_sends_h_alone_and_answers_the_gradient_with_k_scalars(device):
    sent, _ = device(ROUND, gradient())
    (frame,) = of(Frame, sent)
    assert frame.kind is FrameKind.ACTIVATION
    (answer,) = of(Derivatives, sent)
    scalars = np.frombuffer(answer.scalars, "<f4")
    assert (answer.run, answer.epoch, answer.round, len(scalars)) == (1, 5, 0, K)
    assert np.abs(scalars).min() > 0


def test_scalars_are_linear_in_the_gradient_and_a_started_again_device_computes_the_same(device):
    once, _ = device(ROUND, gradient())
    twice, _ = device(gradient(2.0))  # no round was heard: it restarted after its activation
    (one,), (two,) = of(Derivatives, once), of(Derivatives, twice)
    np.testing.assert_array_equal(
        2 * np.frombuffer(one.scalars, "<f4"), np.frombuffer(two.scalars, "<f4")
    )


def test_a_repeated_gradient_is_answered_again_until_the_answer_is_acknowledged(device):
    acknowledged = encode(Scalars(1, 0, bytes(4 * K)))
    sent, _ = device(ROUND, gradient(), gradient(), ROUND, gradient(), acknowledged, gradient())
    answers = of(Derivatives, sent)
    assert len(answers) == 3
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (gradient(tensor=np.zeros((BATCH, 13), np.float32)), "shape"),
        (gradient(tensor=np.zeros((BATCH + 1, 12), np.float32)), "shape"),
        (gradient(np.nan), "not finite"),
        (gradient(kind=FrameKind.ACTIVATION), "not for a device"),
        (gradient(kind=FrameKind.DIFFERENCES), "not for a device"),
        (gradient(labels=np.zeros(BATCH, np.uint32)), "shape"),
        (gradient(encoding="float16"), "float16"),
        (gradient()[:-1], "promises"),
        (gradient()[:90] + b"?" + gradient()[91:], "checksum"),
        (gradient()[:30], "shorter"),
    ],
)
def test_ill_shaped_gradients_are_refused(device, payload, text):
    sent, said = device(ROUND, payload)
    assert of(Derivatives, sent) == []
    assert any("ignored a message" in line and text in line for line in said)


@pytest.mark.parametrize("changes", [{"round": 1}, {"run": 2}, {"epoch": 6}])
def test_gradients_of_another_round_run_or_session_are_ignored(device, changes):
    sent, _ = device(ROUND, gradient(**changes))
    assert of(Derivatives, sent) == []
    assert len(of(Ready, sent)) == 1


def test_a_run_with_loss_differences_takes_no_gradient(device):
    sent, said = device(ROUND, gradient(), feedback="loss_difference")
    assert of(Derivatives, sent) == []
    assert any("not for a device" in line for line in said)


@pytest.mark.parametrize("scalars", [np.zeros(K - 1), np.zeros(K + 1), np.zeros(0)])
def test_the_server_refuses_ill_shaped_derivatives(experiment, tmp_path, scalars):
    (tmp_path / "run").mkdir()
    fleet = InProcessFleet(experiment)
    run = open_run(
        experiment._replace(folder=tmp_path / "run"), frozen=False,
        devices=[(i, f"d{i}") for i in range(3)], outbox=fleet, notify=lambda _: None,
    )  # fmt: skip
    run.start([0, 1, 2])
    with pytest.raises(FrameFaultError, match="derivatives"):
        run.derivatives(0, Derivatives(run.header.run, 0, 0, scalars.astype("<f4").tobytes()))
    early = Derivatives(run.header.run, 0, 0, np.zeros(K, "<f4").tobytes())
    run.derivatives(0, early)  # not asked: ignored
    tensor = np.zeros((K, BATCH, 12), np.float32)
    for kind in (FrameKind.DIFFERENCES, FrameKind.CUT_GRADIENT):
        with pytest.raises(FrameFaultError, match="do not send"):
            run.frame(0, Frame(kind, run.header.run, 0, 0, 0, tensor, NO_LABELS))
    run.close("interrupted")
