"""What is left of a run that was stopped: weights, commits and devices, from its journal.

The journal is the truth. The checkpoint only saves replaying the rounds before it, and counts when
its weights have the digests that the journal holds for that round.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.checkpoint import CHECKPOINT_FILE, Checkpoint, load_checkpoint
from server_node.errors import JournalError
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
from wire_protocol.manifest import sha256
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


class History(NamedTuple):
    """The past of a run with the weights it came to."""

    past: Past
    client: ClientState
    server: Vector  # (d_s,)
    commits: list[Commit]  # of every closed round
    notes: list[str]  # what was damaged, and what was done about it


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
    for number in range(start.next_round, len(rounds)):
        apply_client(state, header, rounds[number], generator)
        apply_server(server, header, rounds[number], generator)
        known = digests.get(number + 1)
        have = sha256(state.state), sha256(server)
        if known and have != (known.client_sha256, known.server_sha256):
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
    return History(past, state, server, commits, notes)


def _checkpoint(past: Past, client: Vector, server: Vector, notes: list[str]) -> Checkpoint | None:
    """The checkpoint, or None when it is not usable; `notes` says why."""
    try:
        checkpoint = load_checkpoint(past.folder)
    except InputError as error:
        notes.append(f"{error}; all rounds are replayed")
        return None
    known = past.digests.get(checkpoint.next_round)
    shapes = (checkpoint.client.shape, checkpoint.server.shape) == (client.shape, server.shape)
    same = known is not None and (sha256(checkpoint.client), sha256(checkpoint.server)) == (
        known.client_sha256, known.server_sha256
    )  # fmt: skip
    if shapes and same and checkpoint.next_round <= len(past.rounds):
        return checkpoint
    path = past.folder / CHECKPOINT_FILE
    notes.append(f"{path}: not the weights that the journal names; all rounds are replayed")
    return None
