"""What a device computes for a stem: sums over its samples of what a bundle makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from edge_client.session import ClientSession
from edge_client.shard import Shard, check_shard
from wire_protocol.manifest import prepare_inputs
from wire_protocol.moments import Moments

_BATCH: Final = 64
# Batches that are added at once: the second moment is far larger than a batch.
_JOINED: Final = 8


def shard_moments(
    bundle: Bundle, shard: Shard, threads: int = 1, notify: Callable[[int], None] = lambda _: None
) -> Moments:
    """Count, sum and second moment of the bundle's activations over a shard, forward passes only.

    `notify` is told how many samples are done. Raises ShardError, BundleError.
    """
    check_shard(shard, bundle.manifest)
    session = ClientSession(bundle, _BATCH, threads)
    moments = Moments.nothing(bundle.digest, math.prod(bundle.manifest.activation.shape))
    waiting: list[NDArray[np.float32]] = []
    for first in range(0, shard.samples, _BATCH):
        # A session has one batch size: the last batch is filled with its last sample.
        chosen = np.minimum(np.arange(first, first + _BATCH), shard.samples - 1)
        new = min(_BATCH, shard.samples - first)
        xs = prepare_inputs([x[chosen] for x in shard.xs], bundle.manifest.inputs)
        waiting.append(session.forward(xs).reshape(_BATCH, -1)[:new].copy())
        if len(waiting) == _JOINED or first + new == shard.samples:
            moments = moments.add(np.concatenate(waiting))
            waiting = []
        notify(first + new)
    return moments
