"""The coordinator of the barrier mode.

It decides who takes part in a round, what the server does with its time (tau steps for one device
while others are awaited), and when the round closes. MQTT, an in-process fleet and the tests
drive the same state machine.
"""

from __future__ import annotations

import math

from server_node.actions import (
    Action,
    CloseRound,
    Contribution,
    Ignore,
    OpenRound,
    Outcome,
    Remind,
    Reply,
    Rules,
    SendGradient,
    Step,
    Work,
)
from server_node.coordination import BARREN, Coordination
from server_node.work_queue import RoundShare, WorkQueue
from wire_protocol.directions import participants as draw_participants


class Coordinator(Coordination[RoundShare]):
    """The barrier: a round closes when all, or the quorum at its deadline, are in."""

    def __init__(self, rules: Rules, devices: list[int], now_s: float) -> None:
        super().__init__(rules, devices, now_s)
        self._awaiting: set[int] = set()  # participants that have not delivered all their frames
        self._work = WorkQueue(rules, self._shares)
        self._opened_s = self._deadline_from_s = now_s
        self._deadline_over = False

    # -- events ------------------------------------------------------------------------------

    def start(self, now_s: float, number: int = 0) -> list[Action]:
        """Open the first round, or the next one of a run that goes on."""
        return self._open(number, now_s)

    def joined(self, device: int, now_s: float) -> list[Action]:
        """A device is (back) in touch; returns what it must be told of the open round."""
        if self._attendance.joined(device):
            self._progress_s = now_s
        share = self._shares.get(device)
        if self.finished or share is None or share.dropped:
            return self._open(self.round, now_s) if self._idle() else []
        if share.complete:
            return [self._reply(device, share)]
        if share.asked and not share.client_scalars:
            return [SendGradient(device, self.round)]
        if self._delivered(share) or (share.activation and self._rules.cut_gradient):
            return []
        return [Remind(device, self.round, sorted(self._shares))]

    def left(self, device: int, now_s: float) -> list[Action]:
        """A device's connection ended; its round waits `rejoin_s` for it."""
        self._attendance.left(device, now_s)
        return self.tick(now_s)

    def derivatives(
        self, device: int, round_number: int, scalars: list[float], now_s: float
    ) -> list[Action]:
        """Cut-gradient feedback: a device's K scalars are here; not finite: none can be."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        if share.complete:  # its acknowledgement was lost
            return [Ignore(device, "duplicate"), self._reply(device, share)]
        if not share.asked or len(scalars) != self._rules.directions:
            return [Ignore(device, "not asked")]
        self._progress_s = now_s
        if not all(map(math.isfinite, scalars)):
            return self._poisoned(device, now_s)
        share.client_scalars = dict(enumerate(scalars))
        self._awaiting.discard(device)
        return [*self._completed(device, share), *self._close_if_complete(now_s)]

    def stepped(self, device: int, scalars: list[float], now_s: float) -> list[Action]:
        """A server step was computed: its K_s scalars, or in first order its loss."""
        share = self._shares[device]
        share.server_scalars.append(scalars)
        if len(share.server_scalars) == 1 and self.tau.adaptive:
            self._plan(share, now_s)
        self._progress_s = now_s
        actions: list[Action] = []
        group = self._work.pool or [device]
        if not all(map(math.isfinite, scalars)):
            for member in group:
                self._drop(member, "not finite")
        elif len(share.server_scalars) == share.tau:
            for member in group:
                actions += self._all_stepped(member, now_s)
        return [*actions, *self._close_if_complete(now_s)]

    def measured(
        self, device: int, first_k: int, scalars: list[float], now_s: float
    ) -> list[Action]:
        """A group of loss differences was computed."""
        share = self._shares[device]
        share.take_scalars(first_k, scalars)
        self._progress_s = now_s
        if not all(map(math.isfinite, scalars)):
            self._drop(device, "not finite")
        return [*self._completed(device, share), *self._close_if_complete(now_s)]

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed: absences, deadline, stall."""
        if self.finished:
            return []
        for device in self._attendance.expired(now_s):
            self._drop(device, "left")
        if self._deadline_passed(now_s):
            self._deadline_over = True
            delivered = [d for d, share in self._live() if self._in_time(share)]
            if len(delivered) >= max(1, self._rules.quorum):
                for device, share in list(self._live()):
                    if not self._in_time(share):
                        self.tau.arrived(device, now_s - self._opened_s)
                        self._drop(device, "deadline")
        if now_s - self._progress_s >= self._rules.stall_s:
            missing = [device for device, share in self._live() if not share.complete]
            return self._stalled("round", missing)
        return self._close_if_complete(now_s)

    # -- questions ---------------------------------------------------------------------------

    def next_work(self) -> Work | None:
        """The most useful piece of work, or None."""
        return self._work.next()

    def batch(self, first: Step) -> list[Step]:
        """The steps to compute at once, beginning with `first`; one of each replica."""
        return self._work.batch(first)

    def all_work(self) -> list[Work]:
        """A piece of every device that has one: a step, or when it has all a measurement."""
        return self._work.all()

    def wake_s(self) -> float | None:
        """When `tick` must be called at the latest, or None."""
        if self.finished:
            return None
        times = [*self._attendance.wake_times_s(), self._progress_s + self._rules.stall_s]
        if self._rules.deadline_s and self._shares and not self._deadline_over:
            times.append(self._deadline_from_s + self._rules.deadline_s)
        return min(times)

    @property
    def pool(self) -> list[int]:
        """Pooled: the devices of the open round whose frames are stepped on, ascending."""
        return self._work.pool

    @property
    def waiting(self) -> bool:
        """True while a participant has not delivered all its frames."""
        return bool(self._awaiting)

    # -- inside ------------------------------------------------------------------------------

    def _arrived(self, device: int, share: RoundShare, now_s: float) -> None:
        self._progress_s = now_s
        self._work.line_up(device, has_all=self._delivered(share))
        if self._delivered(share):
            self._awaiting.discard(device)
            self.tau.arrived(device, now_s - self._opened_s)
            self._hurry()

    def _plan(self, share: RoundShare, now_s: float) -> None:
        """Give a device, after its first step, the steps that its part of the slack holds.

        The slack lasts until the last frame of the round is expected. The devices of a slot that
        have not begun get equal parts of it, but for the one that ends it.
        """
        expected_s = {
            device: self._opened_s + latency_s
            for device, other in self._live()
            if not self._delivered(other) and (latency_s := self.tau.latency_s(device)) is not None
        }
        close_s = max(expected_s.values(), default=now_s)
        if self._rules.deadline_s:
            close_s = min(close_s, self._opened_s + self._rules.deadline_s)
        sharing = 1 + sum(
            not other.server_scalars
            and other.rank % self._rules.replicas == share.rank % self._rules.replicas
            and expected_s.get(device, 0.0) < close_s
            for device, other in self._live()
        )
        share.tau = self.tau.tau(1, close_s - now_s, sharing)
        if self._rules.first_order:  # the first step was not its copy's last
            share.tau = max(share.tau, 2)

    def _hurry(self) -> None:
        """Nobody is awaited any more: beyond the floor, the step under way is the last."""
        if self.tau.adaptive and not self.waiting:
            for _, share in self._live():
                share.tau = min(share.tau, max(self._rules.tau, len(share.server_scalars) + 1))

    def _all_stepped(self, device: int, now_s: float) -> list[Action]:
        share = self._shares[device]
        share.stepped = True
        if share.dropped or not (self._rules.cut_gradient and self._rules.directions):
            return self._completed(device, share)
        share.asked = True
        if self._rules.pooled:  # the deadline counts anew for the answers
            self._deadline_from_s, self._deadline_over = now_s, False
        return [SendGradient(device, self.round)]

    def _awaited(self, device: int, round_number: int) -> RoundShare | Ignore:
        share = self._shares.get(device)
        if self.finished or round_number < self.round:
            return Ignore(device, "late")
        if round_number > self.round or share is None:
            return Ignore(device, "not asked")
        if share.dropped:
            return Ignore(device, "late")
        return share

    def _completed(self, device: int, share: RoundShare) -> list[Action]:
        """The reply, when nothing is missing any more."""
        if share.dropped or not share.stepped:
            return []
        if len(share.client_scalars) < self._rules.directions:
            return []
        share.complete = True
        return [self._reply(device, share)]

    def _reply(self, device: int, share: RoundShare) -> Reply:
        return Reply(device, self.round, share.client_scalars_in_order)

    def _poisoned(self, device: int, now_s: float) -> list[Action]:
        self._drop(device, "not finite")
        return self._close_if_complete(now_s)

    def _drop(self, device: int, why: str) -> None:
        share = self._shares.get(device)
        if share is not None and not share.complete and not share.dropped:
            share.dropped = why
            self._awaiting.discard(device)
            self._hurry()

    def _close_if_complete(self, now_s: float) -> list[Action]:
        if self.finished or not self._shares or not all(s.complete for _, s in self._live()):
            return []
        contributions = [
            Contribution(device, share.client_scalars_in_order, share.server_scalars)
            for device, share in sorted(self._shares.items())
            if share.complete
        ]
        dropped = {device: share.dropped for device, share in self._shares.items() if share.dropped}
        if not contributions and "left" in dropped.values() and not self._attendance.candidates():
            # Everybody left: the round stays open for whoever comes back.
            self._forget_round()
            return []
        if contributions:
            self._barren = 0
        elif "not finite" in dropped.values():
            self._barren += 1
        closed = CloseRound(
            self.round, contributions, dropped, self._opened_s, self._stepped_devices()
        )
        self._forget_round()
        if self._barren >= BARREN:
            text = f"{BARREN} rounds in a row gave no finite scalar; use smaller steps"
            return [closed, *self._finish(Outcome.DIVERGED, text)]
        return [closed, *self._open(self.round + 1, now_s)]

    def _stepped_devices(self) -> list[int] | None:
        """See CloseRound.stepped."""
        if self._rules.pooled:
            return [device for device in self._work.pool[:1] if self._shares[device].stepped]
        if not self._rules.first_order:
            return None
        return sorted(device for device, share in self._shares.items() if share.stepped)

    def _forget_round(self) -> None:
        self._shares.clear()
        self._work.clear()

    def _open(self, number: int, now_s: float) -> list[Action]:
        self.round = number
        if number >= self._rules.rounds:
            return self._finish(Outcome.COMPLETE, f"{self._rules.rounds} rounds")
        self._opened_s = self._progress_s = self._deadline_from_s = now_s
        self._deadline_over = False
        self._attendance.next_round()
        chosen = draw_participants(
            self._rules.run_seed, number, self._attendance.candidates(), self._rules.participants
        )
        self._forget_round()
        for rank, device in enumerate(chosen):
            self._shares[device] = RoundShare(tau=self._rules.tau, rank=rank)
        self._awaiting = set(chosen)
        return [OpenRound(number, chosen)] if chosen else []

    def _idle(self) -> bool:
        return not self.finished and not self._shares and 0 <= self.round < self._rules.rounds

    def _live(self) -> list[tuple[int, RoundShare]]:
        return [(device, share) for device, share in self._shares.items() if not share.dropped]

    def _delivered(self, share: RoundShare) -> bool:
        if self._rules.cut_gradient:
            return share.activation and len(share.client_scalars) == self._rules.directions
        return share.has_frames(self._rules)

    def _in_time(self, share: RoundShare) -> bool:
        """Whether a deadline that acts now spares a participant.

        Pooled, nobody can answer the gradient before all activations are here or given up.
        """
        if self._rules.cut_gradient and self._rules.pooled and not share.asked:
            return share.activation
        return self._delivered(share)

    def _deadline_passed(self, now_s: float) -> bool:
        deadline_s = self._rules.deadline_s
        return bool(self._shares) and deadline_s > 0 and now_s >= self._deadline_from_s + deadline_s
