"""A fleet on the virtual clock: devices that compute in this process and answer in virtual time.

The run, its coordinator, the device's trainer, the frames and their decoding are those of a real
run. Virtual are the clock, the links (docs/simulation.md) and who is there. A device's frames are
computed when it is told of the round: nothing that it reads changes before they are sent. All
devices that stand at the same round share one copy of the weights: the server's, which has the
bits of theirs. In the asynchronous mode a device that computes holds on to the copy it began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from edge_client.bundle import Bundle, read_bundle
from edge_client.pacing import PacedSession, Pacing
from edge_client.session import ClientSession
from edge_client.shard import Shard
from edge_client.trainer import Shared, Trainer
from emulation.clock import EventQueue
from emulation.delays import Delays, Presence
from emulation.virtual_links import VirtualLinks
from server_node.actions import Measure, Work
from server_node.errors import FrameFaultError, NotFiniteError
from server_node.prepare import Experiment, open_run
from server_node.run import CATCH_UP_COMMITS, Run
from wire_protocol.directions import DirectionGenerator
from wire_protocol.frames import Frame, FrameKind, decode_frame, encode_frame
from wire_protocol.manifest import sha256
from wire_protocol.messages import (
    Commit,
    Derivatives,
    DownMessage,
    Round,
    Scalars,
)

# A bound that is met to the last bit may not be seen to be met: differences of times are rounded.
# Late in a long run a microsecond is less than the clock can tell.
_LATER_S: Final = 1e-6
_LATER_ULPS: Final = 4.0


class Boards(NamedTuple):
    """What the devices of a simulation have in common, and their shards."""

    bundle: Bundle
    session: PacedSession
    shards: Sequence[Shard]


@dataclass(eq=False)
class _Attempt:
    """What a device computes of a round; whoever holds another one than the device is too late."""

    useless_s: float = math.inf  # when the device learns that it is of no use: it sends no more


class _Part(NamedTuple):
    """A frame of a device's round, its size as it was sent, and when it is ready."""

    frame: Frame
    size_bytes: int
    forwards: int  # computed from the beginning of the round until it is ready


def make_boards(experiment: Experiment, shards: Sequence[Shard]) -> Boards:
    """One session for all devices: they compute one after the other."""
    bundle, devices = read_bundle(experiment.exported.client), experiment.config.devices
    session = ClientSession(bundle, devices.batch, devices.threads)
    return Boards(bundle, PacedSession(session, Pacing()), shards)


class VirtualFleet:
    """The devices of one run, and the outbox, clock and driver of it."""

    def __init__(
        self, experiment: Experiment, boards: Boards, delays: Delays, presence: Presence, *,
        frozen: bool, notify: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self._boards, self._delays, self._presence = boards, delays, presence
        config = experiment.config
        self._together = config.simulation.server == "parallel"
        self._asynchronous = config.round.mode == "asynchronous"
        # Asynchronous and in parallel: a contribution's server steps put off its commit alone.
        lane = self._together and self._asynchronous
        self._lane_s = config.method.tau * delays.server_step_s if lane else 0.0
        self._queue = EventQueue()
        self._names = [f"device-{index:03d}" for index in range(len(boards.shards))]
        self._here = [True] * len(self._names)
        self._here_count = len(self._names)
        self._known: dict[int, int] = {}  # rounds that a device which is away has committed
        self._attempts = [_Attempt() for _ in self._names]
        self._working: set[int] = set()
        self._group: dict[int, int] = {}  # first k of a group of differences -> directions in it
        self._generator = DirectionGenerator()
        self._trainers: dict[int, Trainer] = {}  # of devices that compute, at their weights
        self.client_forwards = 0
        self.run = run = open_run(
            experiment, frozen=frozen, devices=list(enumerate(self._names)), outbox=self,
            notify=notify, read_clock_s=self._queue.read_s, spend=self._spend,
        )  # fmt: skip
        self._links = links = VirtualLinks(
            config.run.fleet, self._names, run.header.run, delays, self._queue.read_s
        )
        run.ledger.traffic = links.traffic
        self._manifest_bytes = len(experiment.client.manifest_data)
        for device in range(len(self._names)):
            self._handshake(device)
        links.bring_bundle(0 if frozen else sum(map(len, experiment.client.blobs)))

    @property
    def now_s(self) -> float:
        """The virtual time since the run began."""
        return self._queue.read_s()

    def play(self) -> Run:
        """Run to the end; files as in any run folder."""
        reason = "interrupted"
        try:
            reason = self._play()
        finally:
            self.run.close(reason)
        return self.run

    def _play(self) -> str:
        run, queue = self.run, self._queue
        eager = run.config.round.deadline_s > 0
        if self._presence.changes:
            for device in range(len(self._names)):
                queue.at(self._presence.spell_s(device, 0), partial(self._leave, device, 0))
        run.start(list(range(len(self._names))))
        work = run.work_together if self._together else run.work
        while run.finished is None:
            worked = work()
            wake_s = math.inf if run.wake_s is None else _after(run.wake_s)
            if not worked and run.finished is None:
                queue.wait_until(min(queue.next_s, wake_s))
            queue.happen()
            if eager or queue.read_s() >= wake_s:
                run.tick()
        return run.finished.outcome.value

    # -- the outbox of the run ---------------------------------------------------------------

    def broadcast(self, message: DownMessage) -> None:
        """Commits end what devices compute; a round is computed by its participants."""
        self._links.broadcast(message, self._here_count)
        if isinstance(message, Commit):
            self._committed()
        elif isinstance(message, Round):
            for device in message.participants:
                self._ask(device, message.round)

    def send(self, device: int, message: DownMessage) -> None:
        """A reply needs no answer here; what a device has missed takes its time on the link."""
        if not self._here[device]:
            return
        arrives_s = self._links.send(device, message)
        if isinstance(message, Round) and (self._asynchronous or device not in self._working):
            if device in self._working:  # dropped: what it computes is of no use
                self._stop(device, self._delays.latency_s)
            self._ask(device, message.round)
        elif isinstance(message, Scalars) and self._asynchronous:
            self._working.discard(device)
            heard_s = self._links.ready_arrives_s(device, arrives_s)
            self._queue.at(heard_s, partial(self._ready, device, self._attempts[device]))

    def send_frame(self, device: int, frame: Frame) -> None:
        """A cut gradient: the device answers it for each of its directions."""
        if not self._here[device]:
            return
        payload = encode_frame(frame, compressed=self.run.config.wire.compression == "zstd")
        arrives_s = self._links.send_frame(device, payload)
        gradient = decode_frame(payload, self.run.terms.compressed_max_bytes)
        answer = partial(self._answer, device, gradient, self._attempts[device])
        self._queue.at(arrives_s, answer)

    def offer_blob(self, data: bytes) -> str:
        """A snapshot that a device will fetch."""
        return sha256(data)

    # -- devices -----------------------------------------------------------------------------

    def _ask(self, device: int, number: int) -> None:
        """A device learns of a round as soon as its link has brought everything up to that."""
        if not self._here[device]:
            return
        arrives_s = self._links.broadcast_arrives_s(device)
        self._attempts[device] = _Attempt()
        self._working.add(device)
        # Computed later, on the weights of now.
        self._trainers[device] = self._trainer(device, number)
        begin = partial(self._begin, device, number, self._attempts[device])
        self._queue.at(arrives_s, begin)

    def _begin(self, device: int, number: int, attempt: _Attempt) -> None:
        """Compute the round; its frames are on their way one after the other."""
        if attempt is not self._attempts[device]:
            return
        begin_s = free_s = self._queue.read_s()
        parts = self._compute(device)
        for part in parts:
            ready_s = begin_s + self._delays.for_forwards(device, number, part.forwards)
            sent_s = max(ready_s, free_s)
            arrives_s = sent_s + self._delays.up_s(device, part.size_bytes)
            free_s = arrives_s - self._delays.latency_s
            arrives_s += self._lane_s if part is parts[-1] else 0.0
            self._queue.at(arrives_s, partial(self._arrive, device, part, attempt, sent_s))

    def _trainer(self, device: int, number: int) -> Trainer:
        """A device before round `number`; commits make other weights, and leave these alone."""
        boards = self._boards
        trainer = Trainer(
            self.run.welcome(device, 0, self._manifest_bytes), boards.session, boards.bundle,
            boards.shards[device], self._queue.read_s,
            Shared(self.run.halves.client, self._generator),
        )  # fmt: skip
        trainer.next_round = number
        return trainer

    def _compute(self, device: int) -> list[_Part]:
        parts: list[_Part] = []
        for payload in self._trainers[device].steps(epoch=0):
            if payload is None:
                continue
            frame = decode_frame(payload, self.run.terms.compressed_max_bytes)
            forwards = 1
            if frame.kind is FrameKind.DIFFERENCES:
                self._group[frame.first_k] = len(frame.tensor)
                forwards += 2 * (frame.first_k + len(frame.tensor))
            parts.append(_Part(frame, self._links.frame_bytes(device, payload), forwards))
        self.client_forwards += parts[-1].forwards
        return parts

    def _arrive(self, device: int, part: _Part, attempt: _Attempt, sent_s: float) -> None:
        if sent_s >= attempt.useless_s:
            return  # it was never sent
        self._links.traffic.sent(part.size_bytes)
        try:
            self.run.frame(device, part.frame)
        except NotFiniteError:
            self.run.ledger.useless("refused")
        except FrameFaultError:  # a device that is refused ends
            self.run.ledger.useless("refused")
            self._gone(device)

    def _answer(self, device: int, gradient: Frame, attempt: _Attempt) -> None:
        """Cut-gradient feedback: 2 K forwards, then K numbers on their way."""
        if attempt is not self._attempts[device]:
            return
        trainer = self._trainers[device]
        (answer,) = [a for a in trainer.answer(0, gradient.tensor) if a is not None]
        forwards = 2 * trainer.welcome.directions
        self.client_forwards += forwards
        number = gradient.round
        took_s = self._delays.for_forwards(device, number, forwards, begun=True)
        ready_s = self._queue.read_s() + took_s
        size_bytes = self._links.control_bytes(device, answer)
        arrives_s = ready_s + self._delays.up_s(device, size_bytes)
        self._queue.at(arrives_s, partial(self._told, device, answer, size_bytes, attempt))

    def _told(self, device: int, answer: Derivatives, size_bytes: int, attempt: _Attempt) -> None:
        if attempt is not self._attempts[device]:
            return
        self._links.traffic.sent(size_bytes)
        try:
            self.run.derivatives(device, answer)
        except FrameFaultError:  # a device that is refused ends
            self.run.ledger.useless("refused")
            self._gone(device)

    def _ready(self, device: int, attempt: _Attempt) -> None:
        """Asynchronous: a device that has its commit asks for other work."""
        if attempt is self._attempts[device] and self._here[device]:
            self._links.count_ready()
            self.run.ready(device, self.run.rounds_closed)

    def _committed(self) -> None:
        self._links.count_reports(self._here_count)
        if self._asynchronous:  # what others compute goes on
            return
        for device in self._working:
            self._stop(device, self._delays.latency_s)
        self._working.clear()

    def _stop(self, device: int, after_s: float) -> None:
        """What it computes is of no use: it learns that `after_s` from now."""
        self._attempts[device].useless_s = self._queue.read_s() + after_s
        self._attempts[device] = _Attempt()

    # -- who is there ------------------------------------------------------------------------

    def _leave(self, device: int, spell: int) -> None:
        self._gone(device)
        away_s = self._presence.spell_s(device, spell + 1)
        self._queue.at(self._queue.read_s() + away_s, partial(self._return, device, spell + 1))

    def _gone(self, device: int) -> None:
        """A device leaves; the server learns it at once."""
        if not self._here[device]:
            return
        self._here[device] = False
        self._here_count -= 1
        self._known[device] = self.run.rounds_closed
        self._working.discard(device)
        self._stop(device, 0.0)
        self.run.left(device)

    def _return(self, device: int, spell: int) -> None:
        self._here[device] = True
        self._here_count += 1
        self._handshake(device)
        self.run.ready(device, self._caught_up(device, self._known.pop(device)))
        here_s = self._presence.spell_s(device, spell + 1)
        self._queue.at(self._queue.read_s() + here_s, partial(self._leave, device, spell + 1))

    def _caught_up(self, device: int, known: int) -> int:
        """Bring a device near enough for the run's next answer; rounds that it knows then.

        As many commits as the run sends at once, then the device asks for more.
        """
        missed = self.run.halves.missed_commits(known) or []  # None: a snapshot brings it all
        while len(missed) > CATCH_UP_COMMITS:
            for commit in missed[:CATCH_UP_COMMITS]:
                self.send(device, commit)
            self._links.count_ready()
            known, missed = known + CATCH_UP_COMMITS, missed[CATCH_UP_COMMITS:]
        return known

    def _handshake(self, device: int) -> None:
        welcome = self.run.welcome(device, 0, self._manifest_bytes)
        self._links.handshake(device, self._boards.shards[device].samples, welcome)

    # -- the server's time -------------------------------------------------------------------

    def _spend(self, pieces: Sequence[Work]) -> None:
        """Pieces that are computed at once take as long as the longest of them."""
        if self._together and self._asynchronous:  # see _lane_s
            return
        self._queue.spend(max(map(self._piece_s, pieces)))

    def _piece_s(self, piece: Work) -> float:
        if isinstance(piece, Measure):
            return self._delays.server_measure_s * self._group[piece.first_k]
        return self._delays.server_step_s


def _after(at_s: float) -> float:
    """A little later: so much that the difference is seen."""
    return at_s + max(_LATER_S, _LATER_ULPS * math.ulp(at_s))
