"""A device's share of a run, made of the bundle and of what it had learned before."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_client.bundle import Bundle
from edge_client.pacing import PacedSession
from edge_client.power.phases import Stopwatch
from edge_client.session import ClientSession
from edge_client.settings import AgentSettings
from edge_client.shard import Shard, check_shard
from edge_client.state import StateStore
from edge_client.trainer import Trainer
from wire_protocol.messages import Welcome


def start_trainer(
    settings: AgentSettings, welcome: Welcome, bundle: Bundle, shard: Shard, store: StateStore,
    stopwatch: Stopwatch, say: Callable[[str], None],
) -> Trainer:  # fmt: skip
    """At the run's first round, or at the saved one where the server has that still.

    Raises InputError for a shard, a bundle or a stand-in that cannot be used.
    """
    check_shard(shard, bundle.manifest)
    pacing = settings.pacing(welcome, bundle)
    if settings.stand_in is not None:
        say(f"stands for {settings.stand_in.board}: {1e3 * pacing.forward_s:.3g} ms a forward")
    session = PacedSession(ClientSession(bundle, welcome.batch, settings.threads), pacing)
    trainer = Trainer(welcome, session, bundle, shard, time.monotonic, stopwatch=stopwatch)
    saved = store.load_weights(trainer.scratch)
    # Saved rounds that the server has lost count for nothing.
    if saved is not None and saved.run == welcome.run and saved.next_round <= welcome.next_round:
        trainer.restore(saved.weights, saved.next_round)
    say(
        f"device {welcome.device}: run {welcome.run:016x}, K {welcome.directions}, batch "
        f"{welcome.batch}, {bundle.manifest.parameters} parameters, from round "
        f"{trainer.next_round} of {welcome.rounds}"
    )
    return trainer
