"""A stopped run goes on to the bits of the undisturbed one, whatever its folder was left like."""

import csv
import json
import resource

import numpy as np
import pytest
from core_support import tiny_config

from edge_client.agent import Agent
from edge_client.power.source import NoSource
from edge_client.settings import AgentSettings
from edge_client.shard import Shard
from edge_client.state import StateStore, read_bundle
from edge_client.trainer import Trainer
from emulation.inprocess import InProcessFleet
from server_node.actions import Outcome
from server_node.checkpoint import load_checkpoint
from server_node.errors import ConfigError, JournalError
from server_node.files import claimed
from server_node.fleet import Fleet
from server_node.journal import (
    DeviceJoined,
    Digests,
    Ended,
    JournalWriter,
    Resumed,
    RoundClosed,
    read_journal,
    read_to_continue,
)
from server_node.prepare import prepare
from server_node.replay import replay
from server_node.resume import read_past, rebuild
from wire_protocol.directions import directions_digest
from wire_protocol.frames import Frame, FrameKind, decode_frame
from wire_protocol.messages import (
    Commit,
    End,
    Entry,
    Join,
    Ready,
    Round,
    Scalars,
    Welcome,
    decode_up,
    encode,
)
from wire_protocol.mqtt import Connected, Received

ROUNDS = 5


@pytest.fixture(scope="module")
def config():
    return tiny_config(f"run.rounds={ROUNDS}", "evaluation.control=false")


def go_on(config, folder):
    """What `--resume` does, with an in-process fleet; returns the run and the notes."""
    past = read_past(folder)
    assert past is not None
    experiment = prepare(config, folder, past)
    history = rebuild(past, experiment.client.initial_parameters(), experiment.server_weights)
    return InProcessFleet(experiment).run(history=history), history.notes


def facts(folder):
    """All rounds with their scalars, and all digests."""
    records = read_journal(folder / "journal.bin").records
    digests = {
        (r.next_round, r.client_sha256, r.server_sha256) for r in records if is_a(r, Digests)
    }
    return [r for r in records if is_a(r, RoundClosed)], digests


def is_a(record, kind):
    return isinstance(record, kind)


def ends(path):
    """Sizes at which the journal ends with a whole record, and those records."""
    data, sizes = path.read_bytes(), []
    position = 8
    while position < len(data):
        position += 8 + int.from_bytes(data[position : position + 4], "little")
        sizes.append(position)
    return sizes[1:], read_journal(path).records


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def after_round(path, number):
    """Size of the journal that ends with this round's record: its commit was not sent yet."""
    return next(
        size for size, record in zip(*ends(path), strict=True)
        if is_a(record, RoundClosed) and record.round == number
    )  # fmt: skip


@pytest.mark.parametrize(
    ("place", "torn"), [(3, 0), (4, 9), (5, 0), (5, 1), (6, 0), (7, 9), (9, 0)]
)
def test_a_journal_cut_anywhere_goes_on_to_the_same_rounds_and_digests(
    config, whole, run, place, torn
):
    """`place` counts records; `torn` bytes of the next one are there as well."""
    path = run / "journal.bin"
    sizes, records = ends(path)
    if place >= len(sizes) or not any(is_a(r, RoundClosed) for r in records[: place + 1]):
        pytest.skip("nothing to continue there")
    cut(path, sizes[place] + torn)
    resumed, notes = go_on(config, run)
    assert resumed.finished.outcome is Outcome.COMPLETE
    assert facts(run) == facts(whole)
    assert any("torn" in note for note in notes) == bool(torn and place + 1 < len(sizes))
    result = replay(run, run)
    assert (result.rounds, result.matches, result.complete) == (ROUNDS, True, True)


def test_a_power_cut_that_left_zeros_behind_costs_nothing(config, whole, run):
    path = run / "journal.bin"
    cut(path, after_round(path, 2))
    path.write_bytes(path.read_bytes() + bytes(4096))
    go_on(config, run)
    assert facts(run) == facts(whole)


def test_a_run_stopped_twice_counts_its_starts_and_is_complete_only_at_its_end(config, whole, run):
    path = run / "journal.bin"
    header, records, _ = read_journal(path)
    path.unlink()
    rounds = [r for r in records if is_a(r, RoundClosed)]
    devices = [r for r in records if is_a(r, DeviceJoined)]
    again = Resumed(1, "cpu", 1, 1, {"numpy": "1.0"})
    stopped = [*devices, rounds[0], Ended("interrupted"), again, rounds[1], Ended("stalled")]
    JournalWriter(path, header, *stopped).close()
    assert not replay(run, run).complete
    assert (read_past(run).ended, read_past(run).resumed) == ("stalled", 1)
    go_on(config, run)
    assert facts(run)[0] == facts(whole)[0]
    assert facts(whole)[1] <= facts(run)[1] | {d for d in facts(whole)[1] if d[0] <= 2}
    assert (read_past(run).ended, read_past(run).resumed) == ("complete", 2)
    assert replay(run, run).complete


@pytest.mark.parametrize("rounds", [0, None])
def test_without_a_closed_round_there_is_nothing_to_continue(run, rounds):
    path = run / "journal.bin"
    cut(path, 5 if rounds is None else ends(path)[0][2])
    assert read_past(run) is None


def test_damage_in_the_middle_is_refused_and_named_and_cutting_there_helps(config, whole, run):
    path = run / "journal.bin"
    begin = after_round(path, 1)
    data = bytearray(path.read_bytes())
    data[begin + 3] ^= 0x40  # the next record's length: absurd, so that it seems to be cut short
    path.write_bytes(data)
    with pytest.raises(JournalError, match=rf"at byte {begin} is damaged.*truncate -s {begin}"):
        read_past(run)
    cut(path, begin)
    go_on(config, run)
    assert facts(run) == facts(whole)


def test_any_altered_byte_is_refused_or_costs_the_last_record_only(run):
    path = run / "journal.bin"
    data = path.read_bytes()
    last = ends(path)[0][-2]
    for position in range(8, len(data), 11):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        if position < last:
            with pytest.raises(JournalError) as caught:
                read_past(run)
            assert "\n" not in str(caught.value)
        else:
            assert read_to_continue(path)[1] == last


@pytest.mark.parametrize("damage", ["missing", "cut", "altered", "another", "empty"])
def test_a_checkpoint_that_is_not_the_journals_is_left_aside(config, whole, run, damage):
    path = run / "checkpoint.npz"
    cut(run / "journal.bin", after_round(run / "journal.bin", 3))
    data = path.read_bytes()
    if damage == "another":
        whole_client = load_checkpoint(run).client
        np.savez(path, client=whole_client + 1, server=whole_client, next_round=np.int64(4))
    else:
        path.write_bytes(
            {"cut": data[:-9], "altered": data[:300] + b"\7" + data[301:]}.get(damage, b"")
        )
        if damage == "missing":
            path.unlink()
    _, notes = go_on(config, run)
    assert any("checkpoint.npz" in note and "replayed" in note for note in notes)
    assert facts(run) == facts(whole)


@pytest.mark.parametrize(
    "name", ["client/client.onnx", "client/manifest.json", "server/weights.bin"]
)
def test_damaged_halves_are_exported_again(config, whole, run, name):
    cut(run / "journal.bin", after_round(run / "journal.bin", 2))
    (run / name).write_bytes(b"")
    go_on(config, run)
    assert facts(run) == facts(whole)
    assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("override", ["method.eta_c=0.3", "run.seed=1", "devices.batch=9"])
def test_another_configuration_is_refused_in_one_line(run, override):
    other = tiny_config(f"run.rounds={ROUNDS}", "evaluation.control=false", override)
    with pytest.raises(JournalError, match="configuration") as caught:
        prepare(other, run, read_past(run))
    assert "\n" not in str(caught.value)


def test_metrics_go_on_and_what_was_lost_of_them_is_empty(config, run):
    cut(run / "journal.bin", after_round(run / "journal.bin", 3))
    path = run / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join([lines[0], "{not json}\n", '["a"]\n', lines[2], lines[4], lines[3][:-9]])
    )
    go_on(config, run)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(ROUNDS))
    assert [row["seconds"] is None for row in rows] == [False, True, False, True, False]
    assert [row["contributions"] for row in rows] == [3] * ROUNDS
    # The weights after round 3 were still there to be scored, those after round 1 were not.
    assert [row["accuracy"] is None for row in rows] == [True, True, True, False, False]
    with (run / "rounds.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["seconds"] == "" for row in table] == [False, True, False, True, False]
    assert json.loads((run / "trace.json").read_text())


def test_a_trace_with_a_torn_end_is_continued(config, run):
    cut(run / "journal.bin", after_round(run / "journal.bin", 1))
    path = run / "trace.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    go_on(config, run)
    names = {event["name"] for event in json.loads(path.read_text())}
    assert {"round 0", "round 4"} <= names


def test_weights_that_diverged_do_not_replace_the_last_good_ones(config, run, monkeypatch):
    monkeypatch.setattr("server_node.halves.DIVERGED_FACTOR", 1.5)
    steep = tiny_config(
        "run.rounds=60", "evaluation.every=1", "method.schedule=constant", "method.eta_c=0.0",
        "method.eta_s=1.0",
    )  # fmt: skip
    experiment = prepare(config, run, read_past(run))
    folder = run / "diverging"
    folder.mkdir()
    result = InProcessFleet(experiment._replace(config=steep, folder=folder)).run()
    assert result.finished.outcome is Outcome.DIVERGED
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert load_checkpoint(folder).next_round == len(rows) - 1 == result.rounds_closed - 1
    assert max(row["loss"] for row in rows[:-1]) < rows[-1]["loss"]


def test_a_journal_on_a_full_disk_takes_the_torn_record_back(tmp_path, run):
    header, records, _ = read_journal(run / "journal.bin")
    path = tmp_path / "journal.bin"
    writer = JournalWriter(path, header, records[0])
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(JournalError, match="free space"):
            writer.append(next(r for r in records if is_a(r, RoundClosed)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size
    writer.append(Ended("interrupted"))
    writer.close()
    assert read_journal(path) == (header, [records[0], Ended("interrupted")], [])


def test_a_run_folder_serves_one_server_at_a_time(tmp_path):
    with claimed(tmp_path), pytest.raises(ConfigError, match="another server"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_a_resumed_fleet_keeps_its_indices_in_any_order_of_return():
    fleet = Fleet(2, [(0, "b"), (1, "a")])
    for device_id, shard, index in (("a", 0, 1), ("c", 1, 2), ("b", 2, 0)):
        fleet.join(device_id, Join(7, 1, "1", shard, 10))
        assert fleet.member(device_id).index == index
        assert fleet.member(device_id).epoch == 7
    assert [member.device_id for member in fleet.numbered()] == ["b", "a", "c"]


# -- the device's side


class Script:
    """A link whose other end is a list of messages."""

    bytes_up = bytes_down = backlog = 0

    def __init__(self, *messages):
        self._events = [Connected(), *(Received("t", encode(message)) for message in messages)]
        self.sent = []

    def publish(self, topic, payload):
        self.sent.append(decode_frame(payload) if topic.endswith("frame") else decode_up(payload))

    def next_event(self, timeout_s):
        return None if timeout_s == 0.0 else self._events.pop(0)  # 0: it is computing


@pytest.fixture
def answers(whole, tmp_path):
    """What a device sends in answer to these messages of the server's, by type."""
    bundle = read_bundle(whole / "client")
    shard = Shard(tmp_path, [np.ones((20, 64))], np.arange(20) % 10, 0)
    stores = []

    def play(*messages):
        store = StateStore(tmp_path / f"state-{len(stores)}")
        stores.append(store)
        link = Script(*messages, End(1, True, "complete"))
        settings = AgentSettings("d", "lab", bundle=whole / "client")
        Agent(settings, 5, shard, store, link, lambda _: None, NoSource("no meter")).run()
        return link.sent

    def welcome(next_round):
        return Welcome(
            run=1, run_seed=0, epoch=5, device=0, manifest_sha256=bundle.digest, manifest_bytes=1,
            directions_sha256=directions_digest(0), lam=1e-3, batch=8, directions=3, rounds=9,
            encoding="float32", compression="none", next_round=next_round,
            feedback="loss_difference", optimiser="sgd", momentum=0.9, beta2=0.999,
            asynchronous=False,
        )  # fmt: skip

    yield play, welcome
    for store in stores:
        store.close()


def commit(number):
    return Commit(1, number, 0.1, 1.0, [Entry(0, 1.0, np.ones(3, "<f4").tobytes())])


def readies(sent):
    return [message.next_round for message in sent if is_a(message, Ready)]


def test_a_device_that_is_ahead_of_a_resumed_server_starts_over(answers):
    play, welcome = answers
    assert readies(play(welcome(0), commit(0), commit(1), welcome(2))) == [0, 2]
    assert readies(play(welcome(0), commit(0), commit(1), welcome(1))) == [0, 0]
    assert readies(play(welcome(0), commit(0), commit(1), welcome(1), commit(0))) == [0, 0]


def test_a_device_whose_round_was_acknowledged_computes_it_again_for_a_resumed_server(answers):
    play, welcome = answers
    asked = Round(1, 0, [0])
    done = Scalars(1, 0, bytes(12))
    frames = [m for m in play(welcome(0), asked, done, asked, commit(0)) if is_a(m, Frame)]
    again = [
        m for m in play(welcome(0), asked, done, welcome(0), asked, commit(0)) if is_a(m, Frame)
    ]
    assert [f.kind for f in frames] == [FrameKind.ACTIVATION, FrameKind.DIFFERENCES]
    assert len(again) == 4
    assert [f.tensor.tobytes() for f in again] == 2 * [f.tensor.tobytes() for f in frames]


def test_a_trainer_that_starts_over_is_the_one_that_began(config, tmp_path):
    fleet = InProcessFleet(prepare(config, tmp_path))
    fleet.run()
    trainer: Trainer = fleet._trainers[0]
    trainer.start_over()
    initial = np.fromfile(tmp_path / "client" / "weights.bin", "<f4", len(trainer.theta))
    assert trainer.next_round == 0
    np.testing.assert_array_equal(trainer.theta, initial)
