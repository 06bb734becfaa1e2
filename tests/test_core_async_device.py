"""The device in the asynchronous mode: commits of others wait while it computes."""

import numpy as np
import pytest
from core_support import tiny_config

from edge_client import commit_queue
from edge_client.agent import Agent
from edge_client.bundle import read_bundle
from edge_client.commit_queue import CommitQueue, own_round
from edge_client.power.source import NoSource
from edge_client.settings import AgentSettings
from edge_client.shard import Shard
from edge_client.state import StateStore
from server_node.prepare import prepare
from wire_protocol.client_optimiser import ClientRule, ClientState
from wire_protocol.directions import DirectionGenerator, directions_digest
from wire_protocol.frames import Frame, decode_frame
from wire_protocol.manifest import sha256
from wire_protocol.messages import (
    Commit,
    End,
    Entry,
    Ready,
    Report,
    Round,
    Scalars,
    Welcome,
    decode_up,
    encode,
)
from wire_protocol.mqtt import Connected, Received

DEVICE, DIRECTIONS = 1, 3


def commit(number, device, staleness=0, digest=""):
    scalars = np.full(DIRECTIONS, 0.01 * (number + 1), "<f4").tobytes()
    return Commit(1, number, 0.5, 1.0, [Entry(device, 0.5, scalars, staleness)], digest)


class Script:
    """A link whose other end is a list of messages; None lets the device compute once."""

    bytes_up = bytes_down = backlog = 0

    def __init__(self, messages):
        self._events = [Connected(), *messages]
        self.sent = []

    def publish(self, topic, payload):
        self.sent.append(decode_frame(payload) if topic.endswith("frame") else decode_up(payload))

    def next_event(self, timeout_s):  # noqa: ARG002
        event = self._events.pop(0)
        return event if event is None or isinstance(event, Connected) else Received(
            "t", encode(event)
        )  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prepare(tiny_config(), folder)
    return folder / "client"


@pytest.fixture
def device(client, tmp_path):
    """What a device sends, given the server's messages; its weights are in `states`."""
    bundle = read_bundle(client)
    welcome = Welcome(
        run=1, run_seed=0, epoch=5, device=DEVICE, manifest_sha256=bundle.digest,
        manifest_bytes=1, directions_sha256=directions_digest(0), lam=1e-3, batch=8,
        directions=DIRECTIONS, rounds=9, encoding="float32", compression="none", next_round=0,
        feedback="loss_difference", optimiser="sgd", momentum=0.9, beta2=0.999, asynchronous=True,
    )  # fmt: skip
    count = iter(range(9))

    def play(*messages):
        store = StateStore(tmp_path / str(next(count)))
        link = Script([welcome, *messages, End(1, True, "complete")])
        shard = Shard(tmp_path, [np.random.default_rng(0).random((20, 64))], np.arange(20) % 10, 0)
        settings = AgentSettings("d", "lab", bundle=client)
        Agent(settings, 5, shard, store, link, lambda _: None, NoSource("no meter")).run()
        store.close()
        return link.sent

    return play


def replayed(client, commits):
    """Digest of the weights that these commits lead to."""
    state = ClientState(ClientRule("sgd", 0.9, 0.999), read_bundle(client).initial_parameters())
    for each in commits:
        state.apply(each, 0, 1e-3, DirectionGenerator())
    return sha256(state.theta)


def frames(sent):
    return [(m.round, m.tensor.tobytes()) for m in sent if isinstance(m, Frame)]


def readies(sent):
    return [m.next_round for m in sent if isinstance(m, Ready)]


def test_directions_are_finished_on_the_weights_they_began_with(device):
    alone = device(Round(1, 0, [DEVICE]), *[None] * 4, commit(0, DEVICE))
    crowded = device(
        Round(1, 0, [DEVICE]), commit(0, 0), None, commit(1, 2, 1), *[None] * 3,
        Scalars(1, 0, bytes(12)), commit(2, DEVICE, 2),
    )  # fmt: skip
    assert len(frames(alone)) == 2
    assert frames(crowded) == frames(alone)
    assert readies(crowded) == [0, 3]


def test_what_waited_is_applied_in_order(device, client):
    others = [commit(0, 0), commit(1, 2, 1)]
    want = replayed(client, [*others, commit(2, DEVICE, 2)])
    sent = device(
        Round(1, 0, [DEVICE]), *others, *[None] * 4, commit(2, DEVICE, 2, want), commit(3, 0)
    )
    assert readies(sent) == [0, 3]  # a digest that did not match would be answered by 0
    assert [m.round for m in sent if isinstance(m, Report)] == [0, 4]  # its own, and at the end


def test_a_commit_with_its_share_stands_in_for_a_lost_reply(device):
    sent = device(Round(1, 0, [DEVICE]), *[None] * 4, commit(0, DEVICE), Round(1, 1, [DEVICE]),
                  *[None] * 4)  # fmt: skip
    assert [number for number, _ in frames(sent)] == [0, 0, 1, 1]


def test_work_that_the_server_gave_up_is_dropped_for_newer(device, client):
    want = replayed(client, [commit(0, 0), commit(1, 2), commit(2, DEVICE)])
    sent = device(
        Round(1, 0, [DEVICE]), commit(0, 0), commit(1, 2), Round(1, 2, [DEVICE]), *[None] * 4,
        commit(2, DEVICE, 0, want),
    )  # fmt: skip
    assert [number for number, _ in frames(sent)][-2:] == [2, 2]
    assert readies(sent) == [0, 3]


def test_commits_are_applied_at_once_while_nothing_is_computed(device):
    sent = device(commit(0, 0), commit(1, 2), Round(1, 2, [DEVICE]), *[None] * 4)
    assert [number for number, _ in frames(sent)] == [2, 2]


def test_only_consecutive_commits_wait_and_too_many_are_let_go(monkeypatch):
    queue = CommitQueue()
    for number in (5, 7, 6, 6, 7):
        queue.add(commit(number, 0), 5)
    assert [each.round for each in queue.take(2)] == [5, 6]
    assert [each.round for each in queue.take()] == [7]
    monkeypatch.setattr(commit_queue, "MAX_COMMITS", 3)
    for number in range(6):
        queue.add(commit(number, 0), 0)
    assert len(queue) == 0
    monkeypatch.setattr(commit_queue, "MAX_SCALAR_BYTES", 4 * DIRECTIONS)
    queue.add(commit(0, 0), 0)
    assert len(queue) == 1
    queue.add(commit(1, 0), 0)
    assert len(queue) == 0


def test_the_round_of_an_own_share_is_told_from_its_staleness():
    assert own_round(commit(7, DEVICE, 3), DEVICE) == 4
    assert own_round(commit(7, 0, 3), DEVICE) is None
