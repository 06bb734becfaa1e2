"""What the server computes with in the open round: its frames, its copies' scalars, its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from server_node.actions import CloseRound, Measure, Step
from server_node.backtracking import Searches
from server_node.config import Config
from server_node.displacement import Displacements
from server_node.first_half import FirstHalf
from server_node.guards import Guards
from server_node.half import ServerHalf
from server_node.journal import RoundClosed
from server_node.pool import Pool, UsedFrame, UsedTurn
from server_node.resume import FirstOrderPast
from server_node.torch_half import ActivationBatch, Turn
from wire_protocol.frames import Frame

Vector = NDArray[np.float32]


class Workbench:
    """The tensors of the open round, or asynchronously of each device's open work."""

    def __init__(self, config: Config, half: ServerHalf | FirstHalf, guards: Guards) -> None:
        self._config, self._half, self._guards = config, half, guards
        self._batches: dict[int, ActivationBatch] = {}
        self._pool = Pool(config.method.reuse_rounds)
        self._displacements = Displacements(config)
        # By device and first k; those that were not measured yet.
        self.differences: dict[tuple[int, int], Vector] = {}
        self.stepped: dict[int, list[list[float]]] = {}  # scalars of a device's server steps
        self.gradients: dict[int, Vector] = {}  # those that were sent, until they are answered

    def restore(self, first: FirstOrderPast) -> None:
        """Take over what a first-order run that goes on needs beside its weights."""
        if isinstance(self._half, FirstHalf):
            self._half.restore(first.optimiser)
            self._pool.restore(first.last_frames)

    def clear(self) -> None:
        """A round is opened."""
        for kept in (self._batches, self.differences, self.stepped, self.gradients):
            kept.clear()
        self._pool.clear()
        self._displacements.clear()

    def clear_device(self, device: int) -> None:
        """Asynchronous: a device begins anew."""
        for kept in (self._batches, self.stepped, self.gradients):
            kept.pop(device, None)
        for key in [key for key in self.differences if key[0] == device]:
            del self.differences[key]

    def place(self, device: int, frame: Frame) -> None:
        """Keep a device's activation and labels."""
        self._batches[device] = self._half.place(frame.tensor, frame.labels)

    def batches_of(self, devices: Sequence[int]) -> list[ActivationBatch]:
        """The activations of some devices."""
        return [self._batches[device] for device in devices]

    # -- work --------------------------------------------------------------------------------

    def step(
        self, steps: Sequence[Step], number: int, pool: list[int], *, last: bool
    ) -> list[list[float]]:
        """Compute steps of round `number`, all slots distinct; returns their scalars.

        `pool` are the devices of pooled steps; after the `last` step of a first-order copy it is
        averaged, and its scalar is NaN when the copy is not finite.
        """
        turns = [
            Turn(
                s.slot,
                s.device,
                self._batch(s, number, pool),
                self.stepped.setdefault(s.device, []),
            )
            for s in steps
        ]  # fmt: skip
        rows = self._half.steps(turns, self._guards)
        if isinstance(self._half, FirstHalf) and last and not self._half.keep():
            rows = [[math.nan]]
        for turn, scalars in zip(turns, rows, strict=True):
            turn.done.append(scalars)
        return rows

    def measure(self, work: Measure, pool: list[int]) -> list[float]:
        """Loss differences of a group of a device's directions."""
        copy = pool[0] if pool else work.device
        differences = self.differences.pop((work.device, work.first_k))
        batch = self._batches[work.device]
        scalars = self._half.measure(copy, batch, differences, self.stepped[copy])
        scalars = self._guards.clip_client(work.device, scalars)
        self._displacements.add(work.device, scalars, differences)
        return scalars

    def gradient(self, device: int, pool: list[int]) -> Vector:
        """dL/dh (batch, *activation shape) at the stepped copy, which the half holds at first."""
        if device not in self.gradients:
            copy = pool[0] if pool else device
            self.gradients[device] = self._half.cut_gradient(
                copy, self._batches[device], self.stepped[copy]
            )
        return self.gradients[device]

    def _batch(self, step: Step, number: int, pool: list[int]) -> ActivationBatch:
        """What a step is computed on."""
        if self._config.method.server_batch == "device":
            return self._batches[step.device]
        return self._pool.batch or self._pool.fill(number, pool, self._batches)

    # -- closing -----------------------------------------------------------------------------

    def frames_of(self, closed: CloseRound) -> list[UsedTurn]:
        """First order: what the steps that count were computed on; otherwise nothing."""
        if not isinstance(self._half, FirstHalf):
            return []
        pooled = self._config.method.server_batch == "pooled"
        return [
            UsedTurn(
                device,
                self._pool.frames
                if pooled
                else [UsedFrame(device, closed.round, self._batches[device])],
            )
            for device in closed.stepped or ()
        ]

    def searches(self, record: RoundClosed) -> Searches:
        """The losses by which the round's step is shortened, where a guard asks for it."""
        rules, half = self._config.guards, self._half
        batches = self.batches_of([share.device for share in record.shares])
        server: Callable[[Vector], float] | None = None
        if rules.backtrack_server:
            server = lambda weights: half.pooled_loss(weights, batches)  # noqa: E731
        moved = self._displacements.of(record)
        if moved is None:
            return Searches(server)
        return Searches(
            server,
            lambda weights, fraction: half.pooled_loss(
                weights,
                [b._replace(h=b.h + fraction * d) for b, d in zip(batches, moved, strict=True)],
            ),
        )
