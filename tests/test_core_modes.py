"""Every mode replays: barrier and asynchronous, both orders and feedbacks, all optimisers."""

import itertools
import random

import pytest
from core_support import play, tiny_config

from server_node.prepare import prepare
from server_node.replay import replay

FIRST = ("method.server_order=first", "method.server_optimiser=Adam", "method.eta_s=0.01")
POOLED = "method.server_batch=pooled"
ASYNCHRONOUS = ("round.mode=asynchronous", "run.rounds=12")
CUT = "method.feedback=cut_gradient"
MODES = {
    f"{time}, {order}, {batch}, {feedback}": (*times, *orders, *batches, *feedbacks)
    for (time, times), (order, orders), (batch, batches), (feedback, feedbacks) in
    itertools.product(
        {"barrier": (), "asynchronous": ASYNCHRONOUS}.items(),
        {"zeroth": (), "first": FIRST}.items(),
        {"device": (), "pooled": (POOLED,)}.items(),
        {"loss difference": (), "cut gradient": (CUT,)}.items(),
    )
    if not (times and batches)  # refused: nobody waits for a pool
}  # fmt: skip
MODES |= {
    "adaptive tau": ("method.tau_mode=adaptive", "method.tau=1", "method.tau_cap=4"),
    "momentum": ("method.client_optimiser=momentum",),
    "Adam, guards": (
        "method.client_optimiser=adam", "method.eta_c=0.01", "guards.clip=2", "guards.reject=true",
        "guards.backtrack_server=true", "guards.backtrack_client=true",
    ),
    "first, guards": (*FIRST, "guards.backtrack_server=true"),
    "asynchronous, guards": (*ASYNCHRONOUS, "guards.reject=true", "guards.backtrack_server=true"),
    "reused frames": (POOLED, "method.reuse_rounds=2", "devices.participants=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return prepare(tiny_config(), tmp_path_factory.mktemp("halves"))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_replays_to_its_digests_and_both_halves_learn(mode, halves, tmp_path):
    experiment = halves._replace(config=tiny_config(*MODES[mode]))
    run = play(experiment, tmp_path / "run")
    assert run.finished is not None
    assert run.finished.outcome.value == "complete"
    result = replay(tmp_path / "run", halves.folder)
    assert (result.matches, result.complete) == (True, True), result.notes
    client, server = experiment.client.initial_parameters(), experiment.server_weights
    assert abs(run.client - client).max() > 1e-6
    assert abs(run.server - server).max() > 1e-6


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith("async")])
def test_the_order_of_arrival_does_not_matter_where_rounds_wait(mode, halves, tmp_path):
    if mode == "adaptive tau":
        pytest.skip("its steps follow the arrivals")
    experiment = halves._replace(config=tiny_config(*MODES[mode]))
    runs = [
        play(experiment, tmp_path / name, shuffle)
        for name, shuffle in (("ordered", None), ("shuffled", random.Random(5)))
    ]
    assert runs[0].client_state.tobytes() == runs[1].client_state.tobytes()
    assert runs[0].server.tobytes() == runs[1].server.tobytes()
