"""Ctrl-C in the middle of a commit leaves a folder that `--resume` goes on with."""

import pytest
from core_support import tiny_config

from emulation.inprocess import InProcessFleet
from server_node.actions import Outcome
from server_node.journal import Ended, read_journal
from server_node.ledger import Ledger
from server_node.prepare import prepare
from server_node.recorder import mean_tau
from server_node.replay import replay
from server_node.resume import read_past, rebuild
from wire_protocol.messages import Derivatives

FIELDS = ("run.rounds=6", "evaluation.control=false", "method.feedback=cut_gradient")
MODES = {
    "zeroth": (),
    "first, asynchronous": ("method.server_order=first", "round.mode=asynchronous"),
}


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_commit_that_is_cut_short(mode, written, tmp_path, monkeypatch):
    config = tiny_config(*FIELDS, *MODES[mode])
    runs, append = [], Ledger.committed

    def committed(ledger, record, guarded):
        if record.round < 3 or written:
            append(ledger, record, guarded)
        if record.round == 3:
            raise KeyboardInterrupt

    def seen(run):
        runs.append(run)
        return False

    monkeypatch.setattr(Ledger, "committed", committed)
    with pytest.raises(KeyboardInterrupt):
        InProcessFleet(prepare(config, tmp_path)).run(enough=seen)
    run = runs[0]
    run.stop()
    answer = bytes(4 * run.terms.directions)  # devices' answers go on coming
    for device in range(config.devices.count):
        for number in range(6):
            run.derivatives(device, Derivatives(run.header.run, 0, number, answer))
    run.tick()
    run.close("interrupted")
    monkeypatch.undo()

    records = read_journal(tmp_path / "journal.bin").records
    assert not any(isinstance(record, Ended) for record in records)
    past = read_past(tmp_path)
    assert len(past.rounds) == 3 + written
    experiment = prepare(config, tmp_path, past)
    history = rebuild(past, experiment.client.initial_parameters(), experiment.server_weights)
    run = InProcessFleet(experiment).run(history=history)
    assert run.finished.outcome is Outcome.COMPLETE
    assert replay(tmp_path, tmp_path).matches


def test_tau_of_pooled_steps_is_that_of_the_device_that_has_them():
    assert mean_tau([2, 0, 0], 1) == 2
    assert mean_tau([2, 3], 1) == 2.5
    assert mean_tau([0, 0], 4) == 4
