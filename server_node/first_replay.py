"""Replaying the server half in first order: the same steps on the journaled frames, in torch.

From the initial weights, or from a checkpoint whose digests the journal holds. The bits are those
of the run on the same versions, processor features and thread counts, which the journal names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from export.exporter import load_halves
from server_node.checkpoint import ANCHOR_FILE, Checkpoint, load_checkpoint
from server_node.errors import JournalError
from server_node.first_half import FirstHalf
from server_node.frames_log import FramesReader
from server_node.journal import Digests, Header, Journal, RoundClosed
from server_node.machine import environment, fix_arithmetic
from server_node.optimisers import OptimiserRule
from server_node.pool import UsedFrame, join
from server_node.sections import ServerSection
from server_node.shares import server_weight
from server_node.torch_half import Turn
from wire_protocol.errors import InputError
from wire_protocol.manifest import SERVER_FOLDER, sha256

Vector = NDArray[np.float32]

_BITS_DEPEND_ON = ("torch", "torch_cpu_capability", "instructions", "processor", "cuda_device")


class ServerState(NamedTuple):
    """Weights (d_s,) and optimiser state (n,)."""

    weights: Vector
    optimiser: Vector


class FirstReplay:
    """The server half of a first-order run, round by round."""

    def __init__(self, header: Header, folder: Path, halves: Path, weights: Vector) -> None:
        """`folder` holds frames.bin, `halves` server/; `weights` (d_s,) are the initial ones."""
        _set_arithmetic(header)
        rule = OptimiserRule(header.server_optimiser, header.server_options)
        module = load_halves(halves / SERVER_FOLDER).server.module
        device = torch.device(header.server_device)
        self._half = FirstHalf(module, weights, rule=rule, device=device)
        self._reader = FramesReader(folder)
        self.notes = _departures(header)

    def begin(self, start: Checkpoint) -> bool:
        """Start at a checkpoint; False when its optimiser state is another one's."""
        if not self._half.takes_state(start.optimiser):
            return False
        self._half.load(start.server)
        self._half.restore(start.optimiser)
        return True

    @property
    def state(self) -> ServerState:
        """What the rounds so far have led to."""
        return ServerState(self._half.weights, self._half.optimiser_state)

    @property
    def digests(self) -> tuple[str, str]:
        """Of weights and optimiser state."""
        state = self.state
        return sha256(state.weights), sha256(state.optimiser)

    def last_frames(self, rounds: int) -> list[UsedFrame]:
        """The frames that a run which goes on behind `rounds` rounds may still reuse."""
        self._reader.find(rounds - 1)  # when it was not read so far
        return [
            UsedFrame(frame.device, frame.round, self._half.place(*frame.arrays()))
            for frame in self._reader.last.values() if frame.round < rounds
        ]  # fmt: skip

    def apply(self, closed: RoundClosed) -> str:
        """Step by one journaled round; returns why that is impossible, or nothing."""
        steps = {share.device: share.server_steps for share in closed.shares if share.server_steps}
        if not steps:
            return ""
        found = self._reader.find(closed.round)
        if found is None:
            return self._reader.fault
        if sorted(device for device, _ in found.turns) != sorted(steps):
            return f"frames.bin: round {closed.round} is not the journal's"
        self._half.start_round(closed.round, closed.eta_s)
        for device, frames in found.turns:
            batch = join([self._half.place(*frame.arrays()) for frame in frames])
            done: list[list[float]] = []
            try:
                for _ in range(steps[device]):
                    done += self._half.steps([Turn(0, device, batch, done)])
            except (RuntimeError, IndexError) as error:  # altered frames need not fit the half
                why = next(iter(str(error).splitlines()), "")
                return f"frames.bin: round {closed.round} does not fit the server half ({why})"
            if not self._half.keep():
                return f"frames.bin: round {closed.round} leads to values that are not finite"
        self._half.commit(closed.eta_g * server_weight(closed))
        return ""


def _set_arithmetic(header: Header) -> None:
    """Compute as the run did: whoever resumed it did so too, in the same configuration."""
    if header.server_device == "cuda" and not torch.cuda.is_available():
        raise JournalError(
            "the server half was computed on CUDA, and there is none here: its first-order steps "
            "cannot be replayed on this machine"
        )
    device: Literal["cpu", "cuda"] = "cuda" if header.server_device == "cuda" else "cpu"
    fix_arithmetic(ServerSection(device=device, threads=header.server_threads))


def _departures(header: Header) -> list[str]:
    """What is here another one than the bits of first-order steps were made with."""
    here = environment()
    changed = [
        f"{key} {header.environment.get(key)} -> {here.get(key)}" for key in _BITS_DEPEND_ON
        if header.environment.get(key) != here.get(key)
    ]  # fmt: skip
    if not changed:
        return []
    return [f"first-order steps may have other bits here: {', '.join(changed)}"]


class FirstFollower:
    """The server half of a first-order run in `musplit replay`: from the anchor, if there is one.

    Where frames.bin ends before the journal, `notes` says why, and the rounds behind are not told.
    """

    def __init__(
        self, folder: Path, halves: Path, journal: Journal, weights: Vector, notes: list[str]
    ) -> None:
        header = journal.header
        self._half = FirstReplay(header, folder, halves, weights)
        self._notes = notes
        notes += self._half.notes
        known = [record for record in journal.records if isinstance(record, Digests)]
        anchor = find_checkpoint(folder, ANCHOR_FILE, known, notes)
        start = Checkpoint(0, weights, weights)
        if anchor is not None and anchor.server.shape == weights.shape:
            start = anchor if self._half.begin(anchor) else start
        self.first_round = self.rounds = start.next_round
        self._next = 0
        self._over = False

    def apply(self, closed: RoundClosed) -> None:
        """Step by the next round."""
        self._next += 1
        if self._over or closed.round < self.first_round:
            return
        fault = self._half.apply(closed)
        if fault:
            self._over = True
            self._notes.append(f"{fault}; the server half is told up to round {self.rounds} only")
        else:
            self.rounds += 1

    def agrees(self, digests: Digests) -> bool:
        """False when the weights are others than journaled; what cannot be told agrees."""
        if self._next != self.rounds:
            return True
        return self._half.digests == (digests.server_sha256, digests.optimiser_sha256)

    @property
    def sha256(self) -> str:
        """Digest of the weights."""
        return self._half.digests[0]


def find_checkpoint(
    folder: Path, name: str, known: Sequence[Digests], notes: list[str]
) -> Checkpoint | None:
    """FOLDER/NAME when the journal has its digests; `notes` says when it is another one's."""
    if not (folder / name).exists():
        return None
    try:
        found = load_checkpoint(folder, name)
    except InputError as error:
        notes.append(str(error))
        return None
    have = sha256(found.server), sha256(found.optimiser)
    if any(
        record.next_round == found.next_round
        and have == (record.server_sha256, record.optimiser_sha256)
        for record in known
    ):
        return found
    notes.append(f"{folder / name}: not the weights that the journal names; not used")
    return None
