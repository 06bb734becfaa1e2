"""Commits of others that came while this device computes: applied when its own is made.

In the asynchronous mode a device finishes its directions on the weights it began with. The queue is
bounded: what does not fit is asked for again later.
"""

from __future__ import annotations

from typing import Final

from wire_protocol.messages import Commit

MAX_COMMITS: Final = 4096
MAX_SCALAR_BYTES: Final = 8 << 20


class CommitQueue:
    """Consecutive commits, the first of them that of `next_round`."""

    def __init__(self) -> None:
        self._commits: list[Commit] = []
        self._scalar_bytes = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._commits)

    def add(self, commit: Commit, next_round: int) -> None:
        """Keep a commit if it is the next one; a queue that is full is emptied."""
        if commit.round != next_round + len(self._commits):
            return
        self._commits.append(commit)
        self._scalar_bytes += _scalar_bytes(commit)
        if len(self._commits) > MAX_COMMITS or self._scalar_bytes > MAX_SCALAR_BYTES:
            self.take()

    def take(self, count: int | None = None) -> list[Commit]:
        """Take out the first `count`, or all, in order."""
        taken = self._commits[:count]
        del self._commits[: len(taken)]
        self._scalar_bytes -= sum(map(_scalar_bytes, taken))
        return taken


def _scalar_bytes(commit: Commit) -> int:
    return sum(len(entry.scalars) for entry in commit.entries)


def own_round(commit: Commit, device: int) -> int | None:
    """The round in which a device drew the directions of its share; None: it has none."""
    for entry in commit.entries:
        if entry.device == device:
            return commit.round - entry.staleness
    return None
