"""Rebuilding both halves from bundle, server half and journal: numpy only.

The live server uses the same functions to close a round, so a replay cannot drift from it. The
server half of a first-order run is replayed by first_replay.py, in torch, from frames.bin.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from export.server_half import read_server_half
from server_node.actions import Outcome
from server_node.errors import JournalError
from server_node.journal import (
    JOURNAL_FILE,
    Digests,
    Ended,
    Header,
    Journal,
    Resumed,
    RoundClosed,
    Share,
    read_journal,
)
from wire_protocol.client_optimiser import ClientState
from wire_protocol.directions import DirectionGenerator
from wire_protocol.estimator import apply_terms, server_terms, step_scale
from wire_protocol.manifest import (
    CLIENT_FOLDER,
    MANIFEST_FILE,
    SERVER_FOLDER,
    WEIGHTS_FILE,
    check_blob,
    parse_manifest,
    sha256,
)
from wire_protocol.messages import Commit, Entry

Vector = NDArray[np.float32]


class ReplayResult(NamedTuple):
    """What a journal leads to, and whether it agrees with the digests the journal holds."""

    rounds: int
    client_sha256: str
    server_sha256: str
    matches: bool | None  # None: the journal holds no digests to compare with
    complete: bool  # it went through all its rounds
    notes: list[str]
    # The rounds that the server half was replayed of: all of them in zeroth order; in first order
    # from a checkpoint on, and as far as frames.bin goes.
    server_first_round: int
    server_rounds: int


def client_commit(run: int, closed: RoundClosed, client_sha256: str = "") -> Commit:
    """The commit that devices replay: the client's part of a journaled round."""
    entries = [
        # Of no weight: a guard's doing, told so that the device knows its share. Without scalars
        # and weight: it has stepped the server half alone.
        Entry(s.device, s.weight, s.client_scalars if s.weight else b"", s.staleness)
        for s in closed.shares
        if s.weight or s.client_scalars
    ]
    return Commit(run, closed.round, closed.eta_c, closed.eta_g, entries, client_sha256)


def apply_client(
    client: ClientState, header: Header, closed: RoundClosed, generator: DirectionGenerator
) -> None:
    """Step the client half in place by one journaled round; overflow gives infinities."""
    commit = client_commit(header.run, closed)
    with np.errstate(over="ignore", invalid="ignore"):
        client.apply(commit, header.run_seed, header.lam, generator)


def apply_server(
    weights: Vector, header: Header, closed: RoundClosed, generator: DirectionGenerator
) -> None:
    """Step the server half (d_s,) in place: x += eta_g * sum_m w_m (x_m - x), from scalars.

    Overflow gives infinities.
    """
    for share in closed.shares:
        scalars = share_scalars(share)
        scale = step_scale(
            closed.eta_s, header.lam, share.directions_server, closed.eta_g * share.server_weight
        )
        terms = server_terms(
            header.run_seed, share.device, closed.round - share.staleness, scalars, scale
        )
        with np.errstate(over="ignore", invalid="ignore"):
            apply_terms(weights, terms, generator)


def share_scalars(share: Share) -> list[list[float]]:
    """Server scalars of a share as (tau, K_s)."""
    flat = np.frombuffer(share.server_scalars, "<f4")
    rows: list[list[float]] = flat.reshape(-1, share.directions_server).tolist()
    return rows


# An altered journal may overflow; its digests tell.
@np.errstate(over="ignore", invalid="ignore")
def replay(folder: Path, halves: Path) -> ReplayResult:
    """Replay FOLDER/journal.bin on HALVES/client and HALVES/server. Raises InputErrors."""
    journal = read_journal(folder / JOURNAL_FILE)
    header = journal.header
    weights, server = _initial_weights(halves, header)
    client = ClientState(header.client_rule, weights)
    generator = DirectionGenerator()
    notes = list(journal.damage)
    follower: Follower = _Zeroth(header, server, generator)
    if header.server_order == "first":
        follower = _first(folder, halves, journal, server, notes)
    matches: bool | None = None
    complete = False
    rounds = 0
    for record in journal.records:
        if isinstance(record, RoundClosed):
            if record.round != rounds:
                raise JournalError(f"{folder / JOURNAL_FILE}: round {rounds} is missing")
            apply_client(client, header, record, generator)
            follower.apply(record)
            rounds += 1
        elif isinstance(record, Digests):
            same = sha256(client.state) == record.client_sha256 and follower.agrees(record)
            if not same and matches is not False:
                notes.append(f"digests differ from the journaled ones after {rounds} rounds")
            matches = same and matches is not False
        elif isinstance(record, Ended | Resumed):
            complete = isinstance(record, Ended) and record.reason == Outcome.COMPLETE.value
    return ReplayResult(
        rounds, sha256(client.state), follower.sha256, matches, complete, notes,
        follower.first_round, follower.rounds,
    )  # fmt: skip


class Follower(Protocol):
    """The server half in a replay."""

    first_round: int
    rounds: int  # as many have been replayed, `first_round` included

    def apply(self, closed: RoundClosed) -> None:
        """Step by the next round."""
        ...

    def agrees(self, digests: Digests) -> bool:
        """False when the weights are others than journaled; what cannot be told agrees."""
        ...

    @property
    def sha256(self) -> str:
        """Digest of the weights."""
        ...


class _Zeroth:
    """Steps from scalars alone."""

    def __init__(self, header: Header, weights: Vector, generator: DirectionGenerator) -> None:
        self.first_round = self.rounds = 0
        self._header, self._weights, self._generator = header, weights, generator

    def apply(self, closed: RoundClosed) -> None:
        apply_server(self._weights, self._header, closed, self._generator)
        self.rounds += 1

    def agrees(self, digests: Digests) -> bool:
        return self.sha256 == digests.server_sha256

    @property
    def sha256(self) -> str:
        return sha256(self._weights)


def _first(
    folder: Path, halves: Path, journal: Journal, weights: Vector, notes: list[str]
) -> Follower:
    # torch, which other replays do without
    from server_node.first_replay import FirstFollower  # noqa: PLC0415

    return FirstFollower(folder, halves, journal, weights, notes)


def _initial_weights(halves: Path, header: Header) -> tuple[Vector, Vector]:
    folder = halves / CLIENT_FOLDER
    data = _read(folder / MANIFEST_FILE)
    if sha256(data) != header.manifest_sha256:
        raise JournalError(
            f"{folder}: another bundle than the journal's ({header.manifest_sha256[:12]}); "
            "give the run's own"
        )
    manifest = parse_manifest(data, str(folder / MANIFEST_FILE))
    weights = _read(folder / WEIGHTS_FILE)
    check_blob(weights, manifest.weights, str(folder / WEIGHTS_FILE))
    server_manifest, server = read_server_half(halves / SERVER_FOLDER)
    if server_manifest.weights.sha256 != header.server_weights_sha256:
        raise JournalError(f"{halves / 'server'}: another server half than the journal's")
    return np.frombuffer(weights, "<f4", manifest.parameters).astype(np.float32), server


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JournalError(
            f"{path}: cannot be read ({error.strerror}); replay needs client/, server/ and "
            f"{JOURNAL_FILE}"
        ) from error
