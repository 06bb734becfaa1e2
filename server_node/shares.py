"""The journal's record of a closed round: whose scalars and steps count, and how much."""

from __future__ import annotations

import numpy as np

from server_node.actions import CloseRound
from server_node.config import Config
from server_node.journal import RoundClosed, Share
from server_node.schedule import step_factor


def close_record(
    closed: CloseRound, config: Config, stepped: dict[int, list[list[float]]]
) -> RoundClosed:
    """The commit of a round; `stepped[device]` are the scalars of its server steps.

    Client half: every contributor with the same weight. Server half: every device of
    `closed.stepped` with the same weight; in first order steps are counted, not told.
    """
    method = config.method
    factor = step_factor(method.schedule, closed.round, config.run.rounds)
    client = {c.device: c.client_scalars for c in closed.contributions}
    server = set(client) if closed.stepped is None else set(closed.stepped)
    first = method.server_order == "first"
    shares = []
    for device in sorted(client.keys() | server):
        steps = stepped[device] if device in server else []
        shares.append(
            Share(
                device, 1.0 / len(client) if device in client else 0.0,
                np.asarray(client.get(device, []), "<f4").tobytes(),
                1.0 / len(server) if device in server else 0.0,
                np.asarray([] if first else steps, "<f4").tobytes(), method.directions_server,
                server_steps=len(steps) if first else 0,
            )
        )  # fmt: skip
    return RoundClosed(
        closed.round, method.eta_c * factor, method.eta_s * factor, method.eta_g, shares
    )
