"""The journal's record of a closed round: whose scalars and steps count, and how much."""

from __future__ import annotations

import numpy as np

from server_node.actions import CloseRound, Contribution
from server_node.config import Config
from server_node.journal import RoundClosed, Share
from server_node.schedule import staleness_weight, step_factor


def close_record(
    closed: CloseRound, config: Config, stepped: dict[int, list[list[float]]]
) -> RoundClosed:
    """The commit of a round; `stepped[device]` are the scalars of its server steps.

    Client half: every contributor with the same weight. Server half: every device of
    `closed.stepped` with the same weight; in first order steps are counted, not told.
    """
    method = config.method
    factor = step_factor(method.schedule, closed.round, config.run.rounds)
    client = {c.device: c for c in closed.contributions}
    server = set(client) if closed.stepped is None else set(closed.stepped)
    first = method.server_order == "first"
    shares = []
    for device in sorted(client.keys() | server):
        steps = stepped[device] if device in server else []
        told = client.get(device) or Contribution(device, [], [], closed.staleness)
        shares.append(
            Share(
                device, _weight(config, told.staleness, len(client)) if device in client else 0.0,
                np.asarray(told.client_scalars, "<f4").tobytes(),
                _weight(config, told.staleness, len(server)) if device in server else 0.0,
                np.asarray([] if first else steps, "<f4").tobytes(),
                method.directions_server, told.staleness,
                server_steps=len(steps) if first else 0,
            )
        )  # fmt: skip
    return RoundClosed(
        closed.round, method.eta_c * factor, method.eta_s * factor, method.eta_g, shares
    )


def server_weight(record: RoundClosed) -> float:
    """First order: how much the mean of a round's copies counts; 1 where nothing lessens it."""
    weights = [share.server_weight for share in record.shares if share.server_steps]
    return float(np.float32(len(weights) * weights[0])) if weights else 1.0


def _weight(config: Config, staleness: int, sharing: int) -> float:
    """Of one of `sharing` devices in a barrier round; of a commit of its own otherwise."""
    if config.round.mode == "barrier":
        return 1.0 / sharing
    return staleness_weight(staleness, config.round.staleness_power, config.participants)
