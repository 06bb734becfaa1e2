"""What the server computes next in an open round of the barrier mode."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from server_node.actions import Measure, Rules, Step, Work
from server_node.progress import Progress


@dataclass(kw_only=True)
class RoundShare(Progress):
    """Progress of one participant in the open round."""

    rank: int  # among the participants
    dropped: str = ""
    queued: bool = False
    stepped: bool = False  # all its server steps are computed, and finite
    complete: bool = False

    @property
    def over(self) -> bool:
        """True when nothing is left to compute for it."""
        return self.complete or bool(self.dropped)


class WorkQueue:
    """The devices of the open round that can be stepped for, in order of arrival.

    `shares` is the coordinator's, by device; the queue only reads it.
    """

    def __init__(self, rules: Rules, shares: dict[int, RoundShare]) -> None:
        self._rules = rules
        self._shares = shares
        self._queue: deque[int] = deque()
        self.pool: list[int] = []  # pooled: the devices of the steps, ascending

    def clear(self) -> None:
        """The round is over."""
        self._queue.clear()
        self.pool = []

    def line_up(self, device: int, *, has_all: bool) -> None:
        """A frame of a device came; `has_all`: nothing of it is missing.

        It lines up with its activation; with all frames where its copy must be measured at once.
        """
        rules, share = self._rules, self._shares[device]
        at_once = rules.first_order and not rules.pooled and not rules.cut_gradient
        if (has_all if at_once else share.activation) and not share.queued:
            share.queued = True
            self._queue.append(device)

    def next(self) -> Work | None:
        """The most useful piece of work, or None.

        Answers first; otherwise the steps of the device whose activation came first, all tau of
        them, so that the working copy is rebuilt as rarely as possible. Pooled steps begin when
        every activation is here that is still awaited.
        """
        if self._rules.pooled and not self._fill_pool():
            return None
        stepping: Work | None = None
        while self._queue and self._shares[self._queue[0]].over:
            self._queue.popleft()
        for device in self._queue:
            share = self._shares[device]
            if share.over:
                continue
            if not share.stepped:
                stepping = stepping or self._step(device)
                if self._rules.replicas == 1:  # those behind it have no steps yet
                    break
            elif share.unmeasured:
                return Measure(device, min(share.unmeasured))
        return stepping

    def batch(self, first: Step) -> list[Step]:
        """The steps to compute at once: `first`, and of each other slot the device that came first.

        A device's slot is its rank among the round's participants, modulo the replicas: it does
        not depend on who arrived when.
        """
        if self._rules.replicas == 1:
            return [first]
        steps = {first.slot: first}
        for device in self._queue:
            share = self._shares[device]
            if not share.dropped and not share.stepped:
                step = self._step(device)
                steps.setdefault(step.slot, step)
        return list(steps.values())

    def all(self) -> list[Work]:
        """A piece of every device that has one: a step, or when it has all a measurement."""
        if self._rules.pooled or self._rules.first_order:  # one copy, in one go
            work = self.next()
            return [work] if work is not None else []
        pieces: list[Work] = []
        for device in self._queue:
            share = self._shares[device]
            if share.over:
                continue
            if not share.stepped:
                pieces.append(self._step(device))
            elif share.unmeasured:
                pieces.append(Measure(device, min(share.unmeasured)))
        return pieces

    def _step(self, device: int) -> Step:
        """The next step of a device; pooled: of the leader."""
        device = self.pool[0] if self.pool else device
        share = self._shares[device]
        return Step(device, len(share.server_scalars), share.rank % self._rules.replicas)

    def _fill_pool(self) -> bool:
        """True when the pooled steps can be computed, or are."""
        if not self.pool:
            live = {device: share for device, share in self._shares.items() if not share.dropped}
            if live and all(share.activation for share in live.values()):
                self.pool = sorted(live)
        return bool(self.pool)
