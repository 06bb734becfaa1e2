"""The coordinator of the asynchronous mode: every contribution is a commit, nobody waits.

Events, actions and work are those of coordinator.py. Rounds count commits. A device is opened at
the version of the weights it has, which names its batch and directions: round v; its contribution
becomes commit w >= v, with staleness w - v. Its server steps begin when its last frame is here and
go on to its last scalar without anything in between: they see one base, the newest.

With cut-gradient feedback they begin with its activation. In first order they are a commit of
their own then: nothing but their frames could make them again. The device's answer is another; one
that comes while others are stepped is committed behind them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from server_node.actions import (
    Action,
    CloseRound,
    Contribution,
    Ignore,
    Measure,
    OpenShare,
    Outcome,
    Remind,
    Reply,
    Rules,
    SendGradient,
    Step,
    Work,
)
from server_node.coordination import BARREN, Coordination
from server_node.progress import Progress
from wire_protocol.directions import participants as draw_participants


@dataclass(kw_only=True)
class _Share(Progress):
    """The open work of one device."""

    version: int  # commits it knows: the round of its batch and directions
    opened_s: float


class AsynchronousCoordinator(Coordination[_Share]):
    """Every contribution closes a round of its own."""

    def __init__(self, rules: Rules, devices: list[int], now_s: float) -> None:
        super().__init__(rules, devices, now_s)
        self._waiting = set(devices)  # present, up to date, without open work
        self._queue: deque[int] = deque()  # devices whose frames are all here, in that order
        self._dropped: dict[int, str] = {}  # since the last commit
        # Their tensors at these weights are not finite: no other work before the next commit.
        self._barred: set[int] = set()
        self._committed_s = now_s

    # -- events ------------------------------------------------------------------------------

    def start(self, now_s: float, number: int = 0) -> list[Action]:
        """Open the first contributions, behind `number` commits of a run that goes on."""
        self.round = number
        if number >= self._rules.rounds:
            return self._finish(Outcome.COMPLETE, f"{self._rules.rounds} rounds")
        self._committed_s = self._progress_s = now_s
        return self._open_waiting(now_s)

    def computing(self, device: int, next_round: int) -> bool:
        """True when the device's open work is that of the weights it has."""
        share = self._shares.get(device)
        return share is not None and share.version == next_round

    def joined(self, device: int, next_round: int, now_s: float) -> list[Action]:
        """A device with the weights before `next_round` wants work; it was sent what it misses."""
        if self._attendance.joined(device):
            self._progress_s = now_s
        share = self._shares.get(device)
        if self.finished or (share is not None and self._in_line(share)):
            return []
        if device in self._barred:
            return []
        if share is not None and share.asked and share.version == next_round:
            return [] if share.client_scalars else [SendGradient(device, share.version)]
        if share is not None and share.version in (next_round, self.round):
            return [Remind(device, share.version, [device])]  # what either side sent was lost
        self._shares.pop(device, None)  # it has, or will have, other weights
        self._waiting.add(device)
        return self._open_waiting(now_s)

    def left(self, device: int, now_s: float) -> list[Action]:
        """A device's connection ended; its open work waits `rejoin_s` for it."""
        if self._attendance.left(device, now_s):
            self._waiting.discard(device)
        return self.tick(now_s)

    def derivatives(
        self, device: int, round_number: int, scalars: list[float], now_s: float
    ) -> list[Action]:
        """Cut-gradient feedback: a device's K scalars are here; not finite: none can be."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        if not share.asked or len(scalars) != self._rules.directions:
            return [Ignore(device, "not asked")]
        self._progress_s = now_s
        if not all(map(math.isfinite, scalars)):
            return self._not_finite(device, now_s)
        share.client_scalars = dict(enumerate(scalars))
        return self._commit_answered(now_s)

    def stepped(self, device: int, scalars: list[float], now_s: float) -> list[Action]:
        """A server step was computed: its K_s scalars."""
        share = self._shares[device]
        share.server_scalars.append(scalars)
        if len(share.server_scalars) == 1 and self.tau.adaptive:
            share.tau = self.tau.tau(1, self._slack_s(now_s), 1)
            if self._rules.first_order:  # the first step was not its copy's last
                share.tau = max(share.tau, 2)
        return self._computed(device, share, scalars, now_s)

    def measured(
        self, device: int, first_k: int, scalars: list[float], now_s: float
    ) -> list[Action]:
        """A group of loss differences was computed."""
        share = self._shares[device]
        share.take_scalars(first_k, scalars)
        return self._computed(device, share, scalars, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed: absences, stall."""
        if self.finished:
            return []
        for device in self._attendance.expired(now_s):
            share = self._shares.get(device)
            if share is not None and not share.has_frames(self._rules):
                self._drop(device, "left")
        if now_s - self._progress_s >= self._rules.stall_s:
            return self._stalled("commit", sorted(self._shares))
        return self._open_waiting(now_s)

    # -- questions ---------------------------------------------------------------------------

    def next_work(self) -> Work | None:
        """The next piece of the device whose frames were here first: steps, then differences."""
        if not self._queue:
            return None
        device = self._queue[0]
        share = self._shares[device]
        if len(share.server_scalars) < share.tau:
            return Step(device, len(share.server_scalars))
        return Measure(device, min(share.unmeasured))

    def all_work(self) -> list[Work]:
        """The next piece: contributions are computed one by one."""
        work = self.next_work()
        return [work] if work is not None else []

    def batch(self, first: Step) -> list[Step]:
        """One device at a time: the next one's copy starts where this one's commit ends."""
        return [first]

    @property
    def pool(self) -> list[int]:
        """Nothing is pooled where nobody waits."""
        return []

    def version(self, device: int) -> int:
        """The round of a device's batch and directions."""
        return self._shares[device].version

    def wake_s(self) -> float | None:
        """When `tick` must be called at the latest, or None."""
        if self.finished:
            return None
        return min([*self._attendance.wake_times_s(), self._progress_s + self._rules.stall_s])

    @property
    def waiting(self) -> bool:
        """True while a device has open work and has not delivered all its frames."""
        return len(self._queue) < len(self._shares)

    # -- inside ------------------------------------------------------------------------------

    def _awaited(self, device: int, round_number: int) -> _Share | Ignore:
        share = self._shares.get(device)
        if self.finished or share is None or round_number < share.version:
            return Ignore(device, "late")
        if round_number > share.version:
            return Ignore(device, "not asked")
        return share

    def _arrived(self, device: int, share: _Share, now_s: float) -> None:
        self._progress_s = now_s
        if self._in_line(share):
            self.tau.arrived(device, now_s - share.opened_s)
            if self._queue and self.tau.adaptive:  # no slack is left: the step under way is enough
                working = self._shares[self._queue[0]]
                enough = max(self._rules.tau, len(working.server_scalars) + 1)
                working.tau = min(working.tau, enough)
            self._queue.append(device)

    def _computed(
        self, device: int, share: _Share, scalars: list[float], now_s: float
    ) -> list[Action]:
        self._progress_s = now_s
        if not all(map(math.isfinite, scalars)):
            return self._not_finite(device, now_s)
        if len(share.server_scalars) < share.tau:
            return []
        if self._rules.cut_gradient and self._rules.directions:
            share.asked = True
            self._queue.popleft()
            actions: list[Action] = [SendGradient(device, share.version)]
            if self._rules.first_order:
                staleness = self.round - share.version
                actions += self._close(None, [device], now_s, staleness)
            return actions + self._commit_answered(now_s)
        if len(share.client_scalars) < self._rules.directions:
            return []
        return self._commit(device, share, now_s)

    def _commit(self, device: int, share: _Share, now_s: float) -> list[Action]:
        in_order = share.client_scalars_in_order
        staleness = self.round - share.version
        contribution = Contribution(device, in_order, share.server_scalars, staleness)
        if not share.asked:
            self._queue.popleft()
        del self._shares[device]
        stepped = ([] if share.asked else [device]) if self._rules.first_order else None
        return [
            Reply(device, share.version, in_order), *self._close(contribution, stepped, now_s)
        ]  # fmt: skip

    def _commit_answered(self, now_s: float) -> list[Action]:
        """Commit what devices have answered, unless steps are under way: they see one base."""
        actions: list[Action] = []
        if self._queue and self._shares[self._queue[0]].server_scalars:
            return actions
        answered = [d for d, share in self._shares.items() if share.asked and share.client_scalars]
        for device in answered:
            if not self.finished and device in self._shares:  # those before it may make it stale
                actions += self._commit(device, self._shares[device], now_s)
        return actions

    def _close(
        self, contribution: Contribution | None, stepped: list[int] | None, now_s: float,
        staleness: int = 0,
    ) -> list[Action]:  # fmt: skip
        """One commit; `stepped` and `staleness` as in CloseRound."""
        contributions = [contribution] if contribution is not None else []
        actions: list[Action] = [
            CloseRound(
                self.round, contributions, self._dropped, self._committed_s, stepped, staleness
            )
        ]
        self._dropped = {}
        self._waiting |= self._barred & self._attendance.present
        self._barred = set()
        self._attendance.next_round()
        self._barren = 0
        self._committed_s = now_s
        self.round += 1
        if self.round >= self._rules.rounds:
            return [*actions, *self._finish(Outcome.COMPLETE, f"{self._rules.rounds} rounds")]
        for other, late in list(self._shares.items()):
            if self.round - late.version > self._rules.staleness_limit:
                self._drop(other, "stale")
        return [*actions, *self._open_waiting(now_s)]

    def _not_finite(self, device: int, now_s: float) -> list[Action]:
        self._drop(device, "not finite")
        self._barren += 1
        if self._barren >= BARREN:
            text = f"{BARREN} contributions in a row had no finite scalar; use smaller steps"
            return self._finish(Outcome.DIVERGED, text)
        return [*self._open_waiting(now_s), *self._commit_answered(now_s)]

    def _poisoned(self, device: int, now_s: float) -> list[Action]:
        """It would send the same again; when nobody else is at work, no commit can come."""
        self._drop(device, "not finite")
        self._waiting.discard(device)
        self._barred.add(device)
        actions = self._open_waiting(now_s)
        if self._shares:
            return actions
        text = "no device's activations are finite; use smaller steps"
        return self._finish(Outcome.DIVERGED, text)

    def _drop(self, device: int, why: str) -> None:
        """Give up a device's open work; if it is here, it may have other work."""
        del self._shares[device]
        if device in self._queue:
            self._queue.remove(device)
        self._dropped[device] = why
        if device in self._attendance.present:
            self._waiting.add(device)

    def _open_waiting(self, now_s: float) -> list[Action]:
        """Give work to devices that wait, as many as may work at once, drawn by the run's seed."""
        free = self._rules.participants - len(self._shares)
        if free <= 0 or not self._waiting or self.finished or self.round < 0:
            return []
        chosen = draw_participants(self._rules.run_seed, self.round, sorted(self._waiting), free)
        for device in chosen:
            self._waiting.discard(device)
            self._shares[device] = _Share(tau=self._rules.tau, version=self.round, opened_s=now_s)
        return [OpenShare(device, self.round) for device in chosen]

    def _in_line(self, share: _Share) -> bool:
        """Whether its server steps can begin, or are under way."""
        if self._rules.cut_gradient:
            return share.activation and not share.asked
        return share.has_frames(self._rules)

    def _slack_s(self, now_s: float) -> float:
        """How long until the frames of the next device are expected: nobody waits until then."""
        if len(self._queue) > 1:
            return 0.0
        expected_s = [
            share.opened_s + latency_s - now_s
            for device, share in self._shares.items()
            if device != self._queue[0] and (latency_s := self.tau.latency_s(device)) is not None
        ]
        return min(expected_s, default=0.0)
