"""A first-order run replays from frames.bin, goes on after a crash, and survives damage."""

import os
import shutil
from pathlib import Path

import pytest
from core_support import tiny_config

from emulation.inprocess import InProcessFleet
from export.client_half import read_client_half
from export.server_half import read_server_half
from server_node.actions import Outcome
from server_node.errors import JournalError
from server_node.frames_log import FRAMES_FILE, FramesReader, continue_frames
from server_node.journal import RoundClosed, read_journal
from server_node.ledger import Ledger
from server_node.prepare import prepare
from server_node.replay import replay
from server_node.resume import read_past, rebuild
from wire_protocol.manifest import sha256

ROUNDS = 6


@pytest.fixture(scope="module")
def config():
    return tiny_config(
        f"run.rounds={ROUNDS}", "evaluation.every=3", "evaluation.control=false",
        "method.server_order=first", "method.server_optimiser=Adam", "method.eta_s=0.01",
        "method.server_batch=pooled", "method.feedback=cut_gradient", "method.reuse_rounds=2",
        "devices.participants=2",
    )  # fmt: skip


def cut_journal(folder, number, more=0):
    """End the journal with the record of round `number`, as a kill behind its commit does."""
    path = folder / "journal.bin"
    data, position, closed = path.read_bytes(), 8, -2
    while closed < number:
        position += 8 + int.from_bytes(data[position : position + 4], "little")
        path.write_bytes(data[:position])
        closed = len([r for r in read_journal(path).records if isinstance(r, RoundClosed)]) - 1
    path.write_bytes(data[: position + more])


def go_on(config, folder):
    past = read_past(folder)
    experiment = prepare(config, folder, past)
    history = rebuild(past, experiment.client.initial_parameters(), experiment.server_weights)
    return InProcessFleet(experiment).run(history=history)


def initial_weights(folder):
    """Of both halves."""
    return (
        read_client_half(folder / "client").initial_parameters(),
        read_server_half(folder / "server")[1],
    )


def weights(result):
    return result.client_sha256, result.server_sha256


def test_both_halves_replay_from_the_beginning(whole):
    result = replay(whole, whole)
    assert (result.rounds, result.matches, result.complete, result.notes) == (6, True, True, [])
    assert (result.server_first_round, result.server_rounds) == (0, ROUNDS)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_run_cut_behind_any_round_goes_on_to_the_same_bits(config, whole, run, number):
    """Round 2 has a checkpoint of its own; what frames.bin holds of later rounds is cut off."""
    cut_journal(run, number, more=5)
    again = go_on(config, run)
    assert again.finished.outcome is Outcome.COMPLETE
    result = replay(run, run)
    assert (result.matches, result.server_rounds) == (True, ROUNDS)
    assert weights(result) == weights(replay(whole, whole))
    assert (run / FRAMES_FILE).read_bytes() == (whole / FRAMES_FILE).read_bytes()


def test_without_its_checkpoint_a_run_goes_on_from_its_frames_alone(config, whole, run):
    cut_journal(run, 4)
    (run / "checkpoint.npz").unlink()
    go_on(config, run)
    assert weights(replay(run, run)) == weights(replay(whole, whole))


def test_frames_cut_at_any_byte_end_the_reading_and_nothing_else(whole, tmp_path):
    path = Path(shutil.copy(whole / FRAMES_FILE, tmp_path))
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        reader = FramesReader(tmp_path)
        found = [number for number in range(ROUNDS) if reader.find(number)]
        assert found == list(range(len(found)))
        assert len(found) < ROUNDS
        assert str(tmp_path) in reader.fault


@pytest.mark.parametrize("part", [0.0, 0.4, 0.8])
def test_frames_cut_short_are_told_and_the_server_half_is_checked_as_far_as_they_go(run, part):
    path = run / FRAMES_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    result = replay(run, run)
    assert result.server_rounds < result.rounds == ROUNDS
    assert result.matches is True
    assert "server half is told up to round" in result.notes[-1]
    cut_journal(run, 4)
    (run / "checkpoint.npz").unlink()
    initial = initial_weights(run)
    with pytest.raises(JournalError, match=r"frames\.bin.*(missing|damaged|not a file)"):
        rebuild(read_past(run), *initial)


def test_altered_frames_are_noticed(run):
    path = run / FRAMES_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    result = replay(run, run)
    assert result.server_rounds < ROUNDS
    assert "damaged" in result.notes[-1]


def test_a_large_file_begins_anew_with_an_anchor(config, whole, tmp_path, monkeypatch):
    """As if the limit were a byte: frames.bin holds the rounds behind the last evaluated one."""
    limit, committed = Ledger.limit_frames, Ledger.committed

    def crash(self, record, guarded):
        if record.round == ROUNDS - 1:
            for part in vars(self).values():
                if hasattr(part, "close"):
                    part.close()
            raise KeyboardInterrupt
        committed(self, record, guarded)

    monkeypatch.setattr(Ledger, "limit_frames", lambda self, _, anchor: limit(self, 1, anchor))
    monkeypatch.setattr(Ledger, "committed", crash)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        InProcessFleet(prepare(config, folder)).run()
    monkeypatch.undo()
    (folder / "checkpoint.npz").unlink()
    go_on(config, folder)
    result = replay(folder, folder)
    assert (result.matches, result.server_first_round, result.server_rounds) == (True, 3, ROUNDS)
    assert weights(result) == weights(replay(whole, whole))
    (folder / "anchor.npz").unlink()
    lost = replay(folder, folder)
    assert (lost.server_rounds, lost.matches) == (0, True)
    assert "round 0 is missing" in lost.notes[-1]


def test_a_resumed_file_is_cut_behind_the_last_committed_round(run):
    size = (run / FRAMES_FILE).stat().st_size
    writer = continue_frames(run, 3)
    writer.close()
    assert 0 < writer.size_bytes == (run / FRAMES_FILE).stat().st_size < size
    assert FramesReader(run).find(2) is not None
    assert FramesReader(run).find(3) is None


def test_digests_of_every_evaluated_round_name_the_optimiser(whole):
    records = read_journal(whole / "journal.bin").records
    digests = [r for r in records if hasattr(r, "optimiser_sha256")]
    assert digests
    assert all(len(record.optimiser_sha256) == 64 for record in digests)
    assert sha256(b"") not in [record.optimiser_sha256 for record in digests]
