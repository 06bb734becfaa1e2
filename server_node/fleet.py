"""The devices of a server: who joined, with which index and session. Pure bookkeeping.

Indices are given once. Before the first run, the lobby collects `count` devices and numbers them
by (shard index, id), so that the order of arrival does not matter; later arrivals come after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from wire_protocol.messages import Join

_NO_SHARD: Final = 1 << 33
# Ids beyond the configured count that may join later, as a factor: a bound on invented ones.
_CROWD: Final = 4


@dataclass
class Member:
    """One device."""

    device_id: str
    join: Join | None  # None: known from the journal, not heard of yet
    index: int | None = None
    ready: bool = False

    @property
    def epoch(self) -> int:
        """Its session; -1 before it has joined."""
        return self.join.epoch if self.join is not None else -1


class Fleet:
    """All devices that ever joined this server; a resumed one knows some by index and id."""

    def __init__(self, count: int, known: Sequence[tuple[int, str]] = ()) -> None:
        self._count = count
        # By index.
        self._numbered = [Member(device_id, None, index) for index, device_id in known]
        self._members = {member.device_id: member for member in self._numbered}
        self._open_lobby = not known

    def join(self, device_id: str, join: Join) -> list[Member]:
        """Take note of a join; returns the members that have just received an index.

        A newcomer to a full fleet is not taken: it is no member afterwards.
        """
        if device_id not in self._members and len(self._members) >= _CROWD * self._count:
            return []
        member = self._members.setdefault(device_id, Member(device_id, join))
        member.join = join
        member.ready = False
        if member.index is not None:
            return []
        waiting = [m for m in self._members.values() if m.index is None]
        if self._open_lobby and len(waiting) < self._count:
            return []
        self._open_lobby = False
        waiting.sort(key=_order)
        for newcomer in waiting:
            newcomer.index = len(self._numbered)
            self._numbered.append(newcomer)
        return waiting

    def leave(self, device_id: str, epoch: int) -> Member | None:
        """The member that this leave ends, or None when it is of an older session."""
        member = self._members.get(device_id)
        if member is None or member.epoch != epoch:
            return None
        member.ready = False
        if member.index is None:
            del self._members[device_id]
        return member

    def member(self, device_id: str) -> Member | None:
        """A device by id."""
        return self._members.get(device_id)

    def numbered(self) -> list[Member]:
        """Members with an index, in its order."""
        return self._numbered

    def new_run(self) -> None:
        """Everybody has to become ready again."""
        for member in self._members.values():
            member.ready = False

    @property
    def waiting_ids(self) -> list[str]:
        """Devices in the lobby."""
        return sorted(m.device_id for m in self._members.values() if m.index is None)


def _order(member: Member) -> tuple[int, str]:
    shard = member.join.shard_index if member.join is not None else -1
    return (shard if shard >= 0 else _NO_SHARD), member.device_id
