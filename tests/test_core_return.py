"""A device that leaves in the middle of a round and comes back changes nothing of the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulation.inprocess import InProcessFleet
from server_node.config import load_config
from server_node.prepare import open_run, prepare
from wire_protocol.frames import decode_frame
from wire_protocol.manifest import sha256

DIGITS = Path(__file__).resolve().parent.parent / "experiments" / "digits.toml"
TINY = [
    "run.rounds=2", "devices.count=1", "devices.batch=8", "method.tau=4",
    "method.directions_client=2", "round.rejoin_s=0.0", "evaluation.control=false",
]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_round_that_lost_everybody_starts_afresh(tmp_path, steps):
    config = load_config(DIGITS, TINY)
    want = InProcessFleet(prepare(config, tmp_path / "undisturbed")).run()
    experiment = prepare(config, tmp_path / "disturbed")
    fleet = InProcessFleet(experiment)
    run = open_run(
        experiment, frozen=False, devices=[(0, "d")], outbox=fleet, notify=lambda _: None
    )
    fleet._trainers = [fleet._trainer(run, 0)]
    run.start([0])
    fleet._opened.popleft()
    activation = next(fleet._trainers[0].steps(epoch=0))
    run.frame(0, decode_frame(activation))
    for _ in range(steps):
        assert run.work()
    run.left(0)
    assert not run.work()
    run.ready(0, 0)
    while run.finished is None:
        fleet._deliver(run, fleet._opened.popleft())
    run.close("complete")
    assert (sha256(run.client), sha256(run.server)) == (sha256(want.client), sha256(want.server))
