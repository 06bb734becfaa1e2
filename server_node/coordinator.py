"""The coordinator: a state machine without I/O and without a clock. Events in, actions out.

It decides who takes part in a round, what the server does with its time (tau steps for one device
while others are awaited), and when the round closes. MQTT, an in-process fleet and the tests
drive the same machine. It never sees tensors: frames are named by device and first k.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from server_node.actions import (
    Action,
    CloseRound,
    Contribution,
    Finish,
    Ignore,
    Measure,
    OpenRound,
    Outcome,
    Remind,
    Reply,
    Rules,
    Step,
    Work,
)
from wire_protocol.directions import participants as draw_participants

# Rounds in a row without a single finite contribution before the run is called diverged.
BARREN_ROUNDS: Final = 5


@dataclass
class _Share:
    """Progress of one participant in the open round."""

    rank: int  # among the participants
    activation: bool = False
    server_scalars: list[list[float]] = field(default_factory=list)
    received: dict[int, int] = field(default_factory=dict)  # first k -> directions of the group
    unmeasured: set[int] = field(default_factory=set)  # first k of groups without scalars yet
    client_scalars: dict[int, float] = field(default_factory=dict)
    dropped: str = ""
    complete: bool = False


class Coordinator:
    """State of one run. `now_s` is any monotonic clock, the same in all calls."""

    def __init__(self, rules: Rules, devices: list[int], now_s: float) -> None:
        self._rules = rules
        self._present = set(devices)
        self._away_since_s: dict[int, float] = {}
        self._gone: set[int] = set()
        self._returned: set[int] = set()  # in the open round
        self._shares: dict[int, _Share] = {}
        self._awaiting: set[int] = set()  # participants that have not delivered all their frames
        self._queue: deque[int] = deque()  # devices whose activation came, in that order
        self._opened_s = self._progress_s = now_s
        self._deadline_over = False
        self._barren = 0
        self.round = -1
        self.finished: Finish | None = None

    # -- events ------------------------------------------------------------------------------

    def start(self, now_s: float, number: int = 0) -> list[Action]:
        """Open the first round, or the next one of a run that goes on."""
        return self._open(number, now_s)

    def joined(self, device: int, now_s: float) -> list[Action]:
        """A device is (back) in touch; returns what it must be told of the open round."""
        if device not in self._present and device not in self._returned:
            # Once a round: a device that comes and goes makes no progress.
            self._returned.add(device)
            self._progress_s = now_s
        self._present.add(device)
        self._away_since_s.pop(device, None)
        self._gone.discard(device)
        share = self._shares.get(device)
        if self.finished or share is None or share.dropped:
            return self._open(self.round, now_s) if self._idle() else []
        if share.complete:
            return [self._reply(device, share)]
        if self._delivered(share):
            return []
        return [Remind(device, self.round, sorted(self._shares))]

    def left(self, device: int, now_s: float) -> list[Action]:
        """A device's connection ended; its round waits `rejoin_s` for it."""
        if device in self._present:
            self._present.discard(device)
            self._away_since_s[device] = now_s
        return self.tick(now_s)

    def activation(self, device: int, round_number: int, now_s: float) -> list[Action]:
        """A device's activation and labels are here."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        if share.activation:
            return [Ignore(device, "duplicate")]
        share.activation = True
        self._queue.append(device)
        self._note_delivery(device, share)
        self._progress_s = now_s
        return []

    def differences(
        self, device: int, round_number: int, first_k: int, count: int, now_s: float
    ) -> list[Action]:
        """A group of a device's differences is here."""
        share = self._awaited(device, round_number)
        if isinstance(share, Ignore):
            return [share]
        if first_k in share.received:
            return [Ignore(device, "duplicate")]
        overlap = any(first_k < k + n and k < first_k + count for k, n in share.received.items())
        if overlap or first_k + count > self._rules.directions:
            return [Ignore(device, "directions out of range")]
        share.received[first_k] = count
        share.unmeasured.add(first_k)
        self._note_delivery(device, share)
        self._progress_s = now_s
        return []

    def stepped(self, device: int, scalars: list[float], now_s: float) -> list[Action]:
        """A server step was computed: its K_s scalars."""
        share = self._shares[device]
        share.server_scalars.append(scalars)
        return self._computed(device, share, scalars, now_s)

    def measured(
        self, device: int, first_k: int, scalars: list[float], now_s: float
    ) -> list[Action]:
        """A group of loss differences was computed."""
        share = self._shares[device]
        share.unmeasured.discard(first_k)
        share.client_scalars.update(enumerate(scalars, first_k))
        return self._computed(device, share, scalars, now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed: absences, deadline, stall."""
        if self.finished:
            return []
        for device, since_s in list(self._away_since_s.items()):
            if now_s - since_s >= self._rules.rejoin_s:
                del self._away_since_s[device]
                self._gone.add(device)
                self._drop(device, "left")
        if self._deadline_passed(now_s):
            self._deadline_over = True
            delivered = [d for d, share in self._live() if self._delivered(share)]
            if len(delivered) >= max(1, self._rules.quorum):
                for device, share in list(self._live()):
                    if not self._delivered(share):
                        self._drop(device, "deadline")
        if now_s - self._progress_s >= self._rules.stall_s:
            missing = [device for device, share in self._live() if not share.complete]
            awaited = f"devices {missing}" if missing else "a device to come back"
            return self._finish(
                Outcome.STALLED,
                f"round {self.round} waited {self._rules.stall_s:.0f} s for {awaited}",
            )
        return self._close_if_complete(now_s)

    # -- questions ---------------------------------------------------------------------------

    def next_work(self) -> Work | None:
        """The most useful piece of work, or None.

        Answers first; otherwise the steps of the device whose activation came first, all tau of
        them, so that the working copy is rebuilt as rarely as possible.
        """
        stepping: Work | None = None
        while self._queue and self._over(self._queue[0]):
            self._queue.popleft()
        for device in self._queue:
            share = self._shares[device]
            if share.dropped or share.complete:
                continue
            if len(share.server_scalars) < self._rules.tau:
                stepping = stepping or self._step(device, share)
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
            if not share.dropped and len(share.server_scalars) < self._rules.tau:
                step = self._step(device, share)
                steps.setdefault(step.slot, step)
        return list(steps.values())

    def all_work(self) -> list[Work]:
        """A piece of every device that has one: a step, or when it has all a measurement."""
        pieces: list[Work] = []
        for device in self._queue:
            share = self._shares[device]
            if share.dropped or share.complete:
                continue
            if len(share.server_scalars) < self._rules.tau:
                pieces.append(self._step(device, share))
            elif share.unmeasured:
                pieces.append(Measure(device, min(share.unmeasured)))
        return pieces

    def wake_s(self) -> float | None:
        """When `tick` must be called at the latest, or None."""
        if self.finished:
            return None
        times = [since_s + self._rules.rejoin_s for since_s in self._away_since_s.values()]
        times.append(self._progress_s + self._rules.stall_s)
        if self._rules.deadline_s and self._shares and not self._deadline_over:
            times.append(self._opened_s + self._rules.deadline_s)
        return min(times)

    @property
    def waiting(self) -> bool:
        """True while a participant has not delivered all its frames."""
        return bool(self._awaiting)

    # -- inside ------------------------------------------------------------------------------

    def _step(self, device: int, share: _Share) -> Step:
        return Step(device, len(share.server_scalars), share.rank % self._rules.replicas)

    def _awaited(self, device: int, round_number: int) -> _Share | Ignore:
        share = self._shares.get(device)
        if self.finished or round_number < self.round:
            return Ignore(device, "late")
        if round_number > self.round or share is None:
            return Ignore(device, "not asked")
        if share.dropped:
            return Ignore(device, "late")
        return share

    def _computed(
        self, device: int, share: _Share, scalars: list[float], now_s: float
    ) -> list[Action]:
        self._progress_s = now_s
        if share.dropped:
            return self._close_if_complete(now_s)
        if not all(map(math.isfinite, scalars)):
            self._drop(device, "not finite")
            return self._close_if_complete(now_s)
        all_steps = len(share.server_scalars) == self._rules.tau
        if not all_steps or len(share.client_scalars) < self._rules.directions:
            return []
        share.complete = True
        return [self._reply(device, share), *self._close_if_complete(now_s)]

    def _reply(self, device: int, share: _Share) -> Reply:
        return Reply(device, self.round, _in_order(share.client_scalars))

    def _drop(self, device: int, why: str) -> None:
        share = self._shares.get(device)
        if share is not None and not share.complete and not share.dropped:
            share.dropped = why
            self._awaiting.discard(device)

    def _close_if_complete(self, now_s: float) -> list[Action]:
        if self.finished or not self._shares or not all(s.complete for _, s in self._live()):
            return []
        contributions = [
            Contribution(device, _in_order(share.client_scalars), share.server_scalars)
            for device, share in sorted(self._shares.items())
            if share.complete
        ]
        dropped = {device: share.dropped for device, share in self._shares.items() if share.dropped}
        if not contributions and "left" in dropped.values() and not self._candidates():
            # Everybody left: the round stays open for whoever comes back.
            self._shares = {}
            self._queue.clear()
            return []
        if contributions:
            self._barren = 0
        elif "not finite" in dropped.values():
            self._barren += 1
        closed = CloseRound(self.round, contributions, dropped, self._opened_s)
        self._shares = {}
        self._queue.clear()
        if self._barren >= BARREN_ROUNDS:
            text = f"{BARREN_ROUNDS} rounds in a row gave no finite scalar; use smaller steps"
            return [closed, *self._finish(Outcome.DIVERGED, text)]
        return [closed, *self._open(self.round + 1, now_s)]

    def _open(self, number: int, now_s: float) -> list[Action]:
        self.round = number
        if number >= self._rules.rounds:
            return self._finish(Outcome.COMPLETE, f"{self._rules.rounds} rounds")
        self._opened_s = self._progress_s = now_s
        self._deadline_over = False
        self._returned.clear()
        chosen = draw_participants(
            self._rules.run_seed, number, self._candidates(), self._rules.participants
        )
        self._shares = {device: _Share(rank) for rank, device in enumerate(chosen)}
        self._awaiting = set(chosen)
        return [OpenRound(number, chosen)] if chosen else []

    def _finish(self, outcome: Outcome, detail: str) -> list[Action]:
        self.finished = Finish(outcome, detail)
        return [self.finished]

    def _idle(self) -> bool:
        return not self.finished and not self._shares and 0 <= self.round < self._rules.rounds

    def _candidates(self) -> list[int]:
        """Devices that may be drawn: present, or away for less than `rejoin_s`."""
        return sorted((self._present | set(self._away_since_s)) - self._gone)

    def _live(self) -> list[tuple[int, _Share]]:
        return [(device, share) for device, share in self._shares.items() if not share.dropped]

    def _delivered(self, share: _Share) -> bool:
        return share.activation and sum(share.received.values()) == self._rules.directions

    def _note_delivery(self, device: int, share: _Share) -> None:
        if self._delivered(share):
            self._awaiting.discard(device)

    def _over(self, device: int) -> bool:
        share = self._shares[device]
        return share.complete or bool(share.dropped)

    def _deadline_passed(self, now_s: float) -> bool:
        deadline_s = self._rules.deadline_s
        return bool(self._shares) and deadline_s > 0 and now_s >= self._opened_s + deadline_s


def _in_order(scalars: dict[int, float]) -> list[float]:
    return [scalars[k] for k in sorted(scalars)]
