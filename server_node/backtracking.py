"""Closing a round: how much of its averaged step is taken, and weights that are finite.

Fractions of two go into the weights of the journaled shares, so a replay takes the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from server_node.journal import Header, RoundClosed
from server_node.replay import apply_client, apply_server
from wire_protocol.client_optimiser import ClientState
from wire_protocol.directions import DirectionGenerator

# Powers of two: a weight times a fraction is exact. Of equal losses the first one wins.
FRACTIONS: Final = (1.0, 0.5, 0.25, 0.125, 0.0)

Vector = NDArray[np.float32]


class Settled(NamedTuple):
    """A round as it is journaled, and what it leads to."""

    record: RoundClosed
    server: Vector  # (d_s,)
    client: ClientState
    interventions: dict[str, float]  # by the names in the journal


class Searches(NamedTuple):
    """Losses of the round's pooled activations; None: the guard is off, or has nothing to go by."""

    server: Callable[[Vector], float] | None = None  # at server weights (d_s,)
    # At server weights (d_s,) and a fraction of the client's own step.
    client: Callable[[Vector, float], float] | None = None


def best_fraction(loss_at: Callable[[float], float]) -> float:
    """The fraction with the lowest loss; 0 when none is finite."""
    losses = {fraction: loss_at(fraction) for fraction in FRACTIONS}
    finite = {f: loss for f, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda f: finite[f], default=0.0)


def settle(
    record: RoundClosed, header: Header, stepped: Callable[[RoundClosed], Vector],
    server: Vector, client: ClientState, generator: DirectionGenerator, searches: Searches,
) -> Settled:  # fmt: skip
    """Take as much of a round's step as is good, and never one to weights that are not finite.

    `server` (d_s,) and `client` are the weights before the round; they are not written to.
    `stepped` gives the server weights (d_s,) that a record leads to.
    """
    found: dict[str, float] = {}
    after = stepped(record)
    if not np.isfinite(after).all():
        found["not_finite_server"] = fraction = 0.0
    elif searches.server is not None and record.shares:
        search = searches.server
        fraction = best_fraction(lambda f: search(_between(server, after, f)))
        found["backtrack_server"] = fraction
    else:
        fraction = 1.0
    if fraction != 1.0:
        record = _weighted(record, server=fraction)
        after = stepped(record)
    fraction = 1.0
    if searches.client is not None and record.shares:
        search_client = searches.client
        fraction = best_fraction(lambda f: search_client(after, f))
        found["backtrack_client"] = fraction
        record = _weighted(record, client=fraction)
    state = _stepped_client(record, header, client, generator)
    if not np.isfinite(state.state).all():
        found["not_finite_client"] = 0.0
        record = _weighted(record, client=0.0)
        state = _stepped_client(record, header, client, generator)
    return Settled(record, after, state, found)


def stepped_server(
    record: RoundClosed, header: Header, server: Vector, generator: DirectionGenerator
) -> Vector:
    """Server weights (d_s,) after a journaled round of zeroth order."""
    after = server.copy()
    apply_server(after, header, record, generator)
    return after


def _stepped_client(
    record: RoundClosed, header: Header, client: ClientState, generator: DirectionGenerator
) -> ClientState:
    after = client.copy()
    apply_client(after, header, record, generator)
    return after


def _between(server: Vector, after: Vector, fraction: float) -> Vector:
    return after if fraction == 1.0 else server + np.float32(fraction) * (after - server)


def _weighted(record: RoundClosed, *, server: float = 1.0, client: float = 1.0) -> RoundClosed:
    """The record with its shares' weights multiplied."""
    shares = [
        msgspec.structs.replace(
            share, weight=share.weight * client, server_weight=share.server_weight * server
        )
        for share in record.shares
    ]
    return msgspec.structs.replace(record, shares=shares)
