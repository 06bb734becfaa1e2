"""What is left of a run that was stopped: weights, commits and devices, from its journal.

The journal is the truth. The checkpoint only saves replaying the rounds before it, and counts when
its weights have the digests that the journal holds for that round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.checkpoint import ANCHOR_FILE, CHECKPOINT_FILE, Checkpoint, load_checkpoint
from server_node.errors import JournalError
from server_node.frames_log import FRAMES_FILE
from server_node.journal import (
    JOURNAL_FILE,
    DeviceJoined,
    Digests,
    Ended,
    Header,
    Journal,
    Resumed,
    RoundClosed,
    read_to_continue,
)
from server_node.replay import apply_client, apply_server, client_commit
from wire_protocol.client_optimiser import ClientState
from wire_protocol.directions import DirectionGenerator
from wire_protocol.errors import InputError
from wire_protocol.manifest import SERVER_FOLDER, sha256
from wire_protocol.messages import Commit

Vector = NDArray[np.float32]


class Past(NamedTuple):
    """A journal that is to be continued, as read; `size_bytes` of it are whole records."""

    folder: Path
    journal: Journal
    size_bytes: int

    @property
    def header(self) -> Header:
        """What the run began with."""
        return self.journal.header

    @property
    def rounds(self) -> list[RoundClosed]:
        """The closed rounds, in order."""
        return [record for record in self.journal.records if isinstance(record, RoundClosed)]

    @property
    def devices(self) -> list[tuple[int, str]]:
        """Devices that were given an index, in its order."""
        joins = [r for r in self.journal.records if isinstance(r, DeviceJoined)]
        return sorted((join.index, join.device_id) for join in joins)

    @property
    def ended(self) -> str:
        """The reason the run was ended with, or empty when it was cut off."""
        records = [r for r in self.journal.records if isinstance(r, Ended | Resumed)]
        return records[-1].reason if records and isinstance(records[-1], Ended) else ""

    @property
    def resumed(self) -> int:
        """How many times the run was continued already."""
        return sum(isinstance(record, Resumed) for record in self.journal.records)

    @property
    def digests(self) -> dict[int, Digests]:
        """The journaled digests by the round they come before."""
        found = (record for record in self.journal.records if isinstance(record, Digests))
        return {record.next_round: record for record in found}


class FirstOrderPast(NamedTuple):
    """What a first-order run goes on with beside the weights."""

    optimiser: Vector  # (n,)
    last_frames: list[Any]  # of each device, pool.UsedFrame


class History(NamedTuple):
    """The past of a run with the weights it came to."""

    past: Past
    client: ClientState
    server: Vector  # (d_s,)
    commits: list[Commit]  # of every closed round
    notes: list[str]  # what was damaged, and what was done about it
    first: FirstOrderPast | None = None


def read_past(folder: Path) -> Past | None:
    """The past in FOLDER, or None when no round was closed: then there is nothing to continue.

    Raises JournalError when the journal is damaged, and by more than a torn end.
    """
    path = folder / JOURNAL_FILE
    found = read_to_continue(path) if path.exists() else None
    if found is None:
        return None
    past = Past(folder, *found)
    for number, record in enumerate(past.rounds):
        if record.round != number:
            raise JournalError(f"{path}: round {number} is missing")
    indices = [index for index, _ in past.devices]
    if indices != list(range(len(indices))):
        raise JournalError(f"{path}: its devices are not numbered from 0 on")
    return past if past.rounds else None


def check_identity(past: Past, config_sha256: str, manifest_sha256: str, server: str) -> None:
    """Raise JournalError unless the run would continue with what it began with.

    `server` is the digest of the server half's initial weights.
    """
    header, parent = past.header, past.folder
    for what, have, want in (
        ("config.toml: not the configuration that", config_sha256, header.config_sha256),
        ("client/: not the bundle that", manifest_sha256, header.manifest_sha256),
        ("server/: not the half that", server, header.server_weights_sha256),
    ):
        if have != want:
            raise JournalError(
                f"{parent}: {what} the run began with (digest {have[:12]}, the journal has "
                f"{want[:12]}); put the original back, or start a new run"
            )


def rebuild(past: Past, client: Vector, server: Vector) -> History:
    """The weights that a journal leads to from the initial ones (d_c,) and (d_s,).

    Starts at the checkpoint when that is the journal's, and replays the rounds behind it.
    """
    header, rounds, digests = past.header, past.rounds, past.digests
    notes = list(past.journal.damage)
    state = ClientState(header.client_rule, client)
    found = _checkpoint(past, state.state, server, notes)
    start = found or Checkpoint(0, state.state, server)
    state.state[...] = start.client
    server = start.server.copy()
    generator = DirectionGenerator()
    first = None
    if header.server_order == "first":
        server, first = _rebuild_first(past, start, server)
    for number in range(start.next_round, len(rounds)):
        apply_client(state, header, rounds[number], generator)
        if first is None:
            apply_server(server, header, rounds[number], generator)
        known = digests.get(number + 1)
        same = known is None or sha256(state.state) == known.client_sha256
        if known and first is None:
            same = same and sha256(server) == known.server_sha256
        if not same:
            raise JournalError(
                f"{past.folder / JOURNAL_FILE}: its rounds up to {number} do not lead to the "
                "digests it holds; the run cannot be continued"
            )
    commits = [
        client_commit(
            header.run, record, known.client_sha256 if (known := digests.get(number)) else ""
        )
        for number, record in enumerate(rounds, 1)
    ]
    return History(past, state, server, commits, notes, first)


def _rebuild_first(past: Past, start: Checkpoint, initial: Vector) -> tuple[Vector, FirstOrderPast]:
    """The server half of a first-order run, on the frames behind `start`; `initial` is its start.

    Raises JournalError when frames.bin does not lead to the journal's digests.
    """
    from server_node.first_replay import FirstReplay  # noqa: PLC0415  torch

    halves = past.folder if (past.folder / SERVER_FOLDER).is_dir() else past.folder.parent
    half = FirstReplay(past.header, past.folder, halves, initial)
    if not half.begin(start):
        raise JournalError(f"{past.folder / CHECKPOINT_FILE}: not this optimiser's; remove it")
    rounds = past.rounds
    for number in range(start.next_round, len(rounds)):
        fault = half.apply(rounds[number])
        known = past.digests.get(number + 1)
        if not fault and known and half.digests != (known.server_sha256, known.optimiser_sha256):
            fault = f"{past.folder / FRAMES_FILE}: round {number} does not lead to the digests"
        if fault:
            raise JournalError(f"{fault}; restore it from a copy, or start a new run")
    state = half.state
    return state.weights, FirstOrderPast(state.optimiser, half.last_frames(len(rounds)))


def _checkpoint(past: Past, client: Vector, server: Vector, notes: list[str]) -> Checkpoint | None:
    """The newest usable checkpoint, or None; `notes` says what was not usable."""
    names = [CHECKPOINT_FILE]
    if past.header.server_order == "first" and (past.folder / ANCHOR_FILE).exists():
        names.append(ANCHOR_FILE)
    for name in names:
        otherwise = "all rounds are replayed" if name == names[-1] else "the anchor is tried"
        try:
            found = load_checkpoint(past.folder, name)
        except InputError as error:
            notes.append(f"{error}; {otherwise}")
            continue
        known = past.digests.get(found.next_round)
        shapes = (found.client.shape, found.server.shape) == (client.shape, server.shape)
        if shapes and _has_digests(found, known) and found.next_round <= len(past.rounds):
            return found
        notes.append(f"{past.folder / name}: not the weights that the journal names; {otherwise}")
    return None


def _has_digests(found: Checkpoint, known: Digests | None) -> bool:
    if known is None:
        return False
    have = sha256(found.client), sha256(found.server)
    optimiser = sha256(found.optimiser) if known.optimiser_sha256 else ""
    return (*have, optimiser) == (
        known.client_sha256, known.server_sha256, known.optimiser_sha256
    )  # fmt: skip
