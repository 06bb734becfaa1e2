"""The frames that the steps of a round are computed on: one device's, or a pool of all.

`method.reuse_rounds`: the last pooled frame of a device that is not in this round counts for some
rounds more. One frame is kept per device then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from server_node.torch_half import ActivationBatch


class UsedFrame(NamedTuple):
    """A frame that steps were computed on: whose, of which round."""

    device: int
    round: int
    batch: ActivationBatch


class UsedTurn(NamedTuple):
    """The frames of a device's steps, or of the leader's, in the order of the batch."""

    device: int
    frames: list[UsedFrame]


class Pool:
    """The pool of the open round, and the frames of earlier ones that may still be used."""

    def __init__(self, reuse_rounds: int) -> None:
        self._reuse_rounds = reuse_rounds
        self._last: dict[int, UsedFrame] = {}
        self.frames: list[UsedFrame] = []  # of the open round, by ascending device
        self.batch: ActivationBatch | None = None

    def restore(self, frames: list[UsedFrame]) -> None:
        """Take over the last frames of a run that goes on."""
        self._last = {frame.device: frame for frame in frames}

    def clear(self) -> None:
        """A round is opened."""
        self.frames, self.batch = [], None

    def fill(
        self, number: int, devices: list[int], fresh: dict[int, ActivationBatch]
    ) -> ActivationBatch:
        """The batch of round `number`: the frames of `devices`, and what may be reused."""
        here = [UsedFrame(device, number, fresh[device]) for device in devices]
        kept = {
            device: frame for device, frame in self._last.items()
            if number - frame.round <= self._reuse_rounds
        }  # fmt: skip
        pooled = kept | {frame.device: frame for frame in here}
        self._last = pooled if self._reuse_rounds else {}
        self.frames = [pooled[device] for device in sorted(pooled)]
        self.batch = join([frame.batch for frame in self.frames])
        return self.batch


def join(batches: list[ActivationBatch]) -> ActivationBatch:
    """One batch of several."""
    if len(batches) == 1:
        return batches[0]
    return ActivationBatch(
        torch.cat([batch.h for batch in batches]), torch.cat([batch.labels for batch in batches])
    )
