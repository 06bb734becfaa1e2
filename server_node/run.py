"""One run: the coordinator's actions carried out, its work computed. No MQTT in here.

An `Outbox` takes the messages; the MQTT node, the in-process fleet and tests bring their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from server_node.actions import (
    Action,
    CloseRound,
    Finish,
    Ignore,
    Measure,
    OpenRound,
    OpenShare,
    Outcome,
    Remind,
    Reply,
    Rules,
    SendGradient,
    Step,
    Work,
)
from server_node.asynchronous import AsynchronousCoordinator
from server_node.backtracking import settle, stepped_server
from server_node.checkpoint import Checkpoint
from server_node.config import Config
from server_node.coordinator import Coordinator
from server_node.curvature import trace_of_hessian, warning
from server_node.errors import FrameFaultError
from server_node.evaluation import Evaluator
from server_node.first_half import FirstHalf
from server_node.frame_checks import check_frame
from server_node.guards import Guards, Intervened
from server_node.half import ServerHalf
from server_node.journal import Header, RoundClosed
from server_node.ledger import Ledger
from server_node.replay import client_commit
from server_node.resume import History
from server_node.schedule import step_factor
from server_node.shares import close_record, server_weight
from server_node.torch_half import Scores
from server_node.workbench import Workbench
from wire_protocol.client_optimiser import ClientState
from wire_protocol.directions import DirectionGenerator, directions_digest
from wire_protocol.frames import HEADER_BYTES, Frame, FrameKind
from wire_protocol.manifest import Manifest, sha256
from wire_protocol.messages import (
    Commit,
    Derivatives,
    DownMessage,
    Round,
    Scalars,
    Snapshot,
    Welcome,
    encode,
)

Vector = NDArray[np.float32]
AnyCoordinator = Coordinator | AsynchronousCoordinator

# A test loss this many times the first one never came back in any run seen.
DIVERGED_FACTOR: Final = 10.0
_MIN_IDLE_S: Final = 0.001
# Commits sent for one `ready`: the next round makes a device that still misses some ask again.
_CATCH_UP_COMMITS: Final = 256


class Outbox(Protocol):
    """Where a run's messages go."""

    def broadcast(self, message: DownMessage) -> None:
        """To every device."""
        ...

    def send(self, device: int, message: DownMessage) -> None:
        """To one device, by index."""
        ...

    def send_frame(self, device: int, frame: Frame) -> None:
        """A tensor to one device, by index; the frame's epoch is filled in."""
        ...

    def offer_blob(self, data: bytes) -> str:
        """Make a blob fetchable; returns its digest."""
        ...


class Run:
    """State of one run between events. All times come from the clock it is given."""

    def __init__(
        self, config: Config, header: Header, manifest: Manifest, half: ServerHalf | FirstHalf,
        evaluator: Evaluator, client: Vector, server: Vector, ledger: Ledger, outbox: Outbox,
        notify: Callable[[dict[str, Any]], None], history: History | None = None,
        read_clock_s: Callable[[], float] = time.monotonic,
        spend: Callable[[Sequence[Work]], None] | None = None,
    ) -> None:  # fmt: skip
        """`client` (d_c,) and `server` (d_s,) are the initial weights; they are not written to.

        `spend` lets the time of a virtual clock pass that pieces of work take.
        """
        self.config, self.header, self.ledger = config, header, ledger
        self._initial = client, server
        self._history = history
        self._read_clock_s, self._spend = read_clock_s, spend
        self._client = (
            ClientState(header.client_rule, client) if history is None else history.client
        )
        self.server = server.copy() if history is None else history.server
        self.finished: Finish | None = None
        self.scores: Scores | None = None
        closed = history.past.rounds if history is not None else []
        self.rounds_closed, self.contributions = len(closed), sum(len(r.shares) for r in closed)
        self._manifest, self._half, self._evaluator = manifest, half, evaluator
        self._outbox, self._notify = outbox, notify
        self._first_loss = math.inf
        self._generator = DirectionGenerator()
        self._coordinator: AnyCoordinator | None = None
        self._commits: list[Commit] = history.commits if history is not None else []
        self._commit_bytes = [len(encode(commit)) for commit in self._commits]
        self._committing = False  # between weights and journal: neither tells of the other
        # Closed and when; recorded once the next round is on its way.
        self._closed: tuple[CloseRound, float, Intervened] | None = None
        self._unanswerable: list[tuple[int, int]] = []  # device and round: no finite gradient
        past = history.past.journal.records if history is not None else ()
        self.guards = Guards(config.guards, past)
        self._bench = Workbench(config, half, self.guards)
        if history is not None and history.first is not None:
            self._bench.restore(history.first)
        self._warned = self.guards.curvature is not None and bool(
            warning(config.method, self.guards.curvature)
        )

    @property
    def client(self) -> Vector:
        """Weights (d_c,) of the client half."""
        return self._client.theta

    @property
    def client_half(self) -> ClientState:
        """The client half as devices have it that applied all commits; not to be written to."""
        return self._client

    @property
    def client_state(self) -> Vector:
        """They and the optimiser's state: what digests are of, and snapshots carry."""
        return self._client.state

    # -- events ------------------------------------------------------------------------------

    def start(self, devices: list[int]) -> None:
        """Everybody is ready: score the initial weights, open the first round, or the next."""
        method, rule = self.config.method, self.config.round
        client, server = self._initial
        self._half.load(server)
        self.scores = self._evaluator.scores(client, self._half)
        self._first_loss = self.scores.loss
        if self._history is not None:
            self._catch_up(self._history)
            if self.finished is not None:
                return
        rules = Rules(
            run_seed=self.config.run.seed, rounds=self.config.run.rounds,
            participants=self.config.participants, tau=method.tau, directions=self.directions,
            quorum=rule.quorum, deadline_s=rule.deadline_s, rejoin_s=rule.rejoin_s,
            stall_s=rule.stall_s, replicas=self.config.server.replicas,
            tau_cap=method.tau_cap if method.tau_mode == "adaptive" else 0,
            staleness_limit=rule.staleness_limit,
            cut_gradient=method.feedback == "cut_gradient", pooled=method.server_batch == "pooled",
            first_order=method.server_order == "first",
        )  # fmt: skip
        kind = AsynchronousCoordinator if self._asynchronous else Coordinator
        self._coordinator = kind(rules, devices, self._read_clock_s())
        self._perform(self._coordinator.start(self._read_clock_s(), self.rounds_closed))

    @property
    def complete(self) -> bool:
        """True when every round is closed."""
        return self.rounds_closed >= self.config.run.rounds

    @property
    def _asynchronous(self) -> bool:
        return self.config.round.mode == "asynchronous"

    @property
    def directions(self) -> int:
        """K that devices are asked for; a frozen client half needs none."""
        frozen = not self.config.method.eta_c or not self._manifest.parameters
        return 0 if frozen else self.config.method.directions_client

    @property
    def compressed_max_bytes(self) -> int:
        """What a compressed frame of this run may grow to; 0 when none is agreed."""
        if self.config.wire.compression == "none":
            return 0
        batch = self.config.devices.batch
        elements = batch * math.prod(self._manifest.activation.shape) * max(1, self.directions)
        return HEADER_BYTES + 4 * (elements + batch)

    def welcome(self, device: int, epoch: int, manifest_bytes: int) -> Welcome:
        """What a device must know of this run."""
        config, method = self.config, self.config.method
        return Welcome(
            run=self.header.run, run_seed=config.run.seed, epoch=epoch, device=device,
            manifest_sha256=self.header.manifest_sha256, manifest_bytes=manifest_bytes,
            directions_sha256=directions_digest(config.run.seed), lam=method.lam,
            batch=config.devices.batch, directions=self.directions, rounds=config.run.rounds,
            encoding=config.wire.encoding, compression=config.wire.compression,
            next_round=self.rounds_closed, feedback=method.feedback,
            optimiser=method.client_optimiser, momentum=method.momentum, beta2=method.beta2,
            asynchronous=self._asynchronous,
        )  # fmt: skip

    def ready(self, device: int, next_round: int) -> None:
        """A device tells its round: send what it misses, then the open round."""
        coordinator = self._coordinator
        if coordinator is None:
            return
        now_s = self._read_clock_s()
        if isinstance(coordinator, AsynchronousCoordinator):
            if not coordinator.computing(device, next_round):
                self._send_missing(device, next_round)
            self._perform(coordinator.joined(device, next_round, now_s))
        else:
            self._send_missing(device, next_round)
            self._perform(coordinator.joined(device, now_s))

    def _send_missing(self, device: int, next_round: int) -> None:
        known = next_round <= len(self._commits)
        # Of weights that are none (model.perturb "none") there is no snapshot.
        if not known or 0 < self.client_state.nbytes < sum(self._commit_bytes[next_round:]):
            digest = self._outbox.offer_blob(self.client_state.astype("<f4").tobytes())
            size_bytes = self.client_state.nbytes
            self._outbox.send(
                device, Snapshot(self.header.run, len(self._commits), digest, size_bytes)
            )
        else:
            for commit in self._commits[next_round : next_round + _CATCH_UP_COMMITS]:
                self._outbox.send(device, commit)

    def left(self, device: int) -> None:
        """A device's connection ended."""
        if self._coordinator is not None:
            self._perform(self._coordinator.left(device, self._read_clock_s()))

    def frame(self, device: int, frame: Frame) -> None:
        """A device's tensor. Raises FrameFaultError when it does not fit this run."""
        coordinator = self._coordinator
        if coordinator is None:
            return
        now_s = self._read_clock_s()
        check_frame(frame, self.config, self._manifest)
        self.ledger.arrived(device, frame, now_s)
        if frame.kind is FrameKind.ACTIVATION:
            actions = coordinator.activation(device, frame.round, now_s)
            if not actions:
                self._bench.place(device, frame)
        else:
            count = len(frame.tensor)
            actions = coordinator.differences(device, frame.round, frame.first_k, count, now_s)
            if not actions:
                self._bench.differences[device, frame.first_k] = frame.tensor
        self._perform(actions)

    def derivatives(self, device: int, answer: Derivatives) -> None:
        """A device's answer to the cut gradient. Raises FrameFaultError when it does not fit."""
        if self._coordinator is None:
            return
        scalars = np.frombuffer(answer.scalars, "<f4")
        if self.config.method.feedback != "cut_gradient":
            raise FrameFaultError("derivatives, and the run learns from loss differences")
        if len(scalars) != self.directions:
            raise FrameFaultError(f"{len(scalars)} derivatives, the run wants {self.directions}")
        row = scalars.tolist()
        if device in self._bench.gradients:  # otherwise it is not asked, or has answered
            row = self.guards.clip_client(device, row)
        now_s = self._read_clock_s()
        self._perform(self._coordinator.derivatives(device, answer.round, row, now_s))

    def tick(self) -> None:
        """Let time pass."""
        if self._coordinator is not None:
            self._perform(self._coordinator.tick(self._read_clock_s()))

    @property
    def wake_s(self) -> float | None:
        """When `tick` must be called at the latest, or None."""
        return self._coordinator.wake_s() if self._coordinator is not None else None

    def idle_s(self, at_most_s: float) -> float:
        """How long nothing happens unless a message comes: until the next `tick` is due."""
        wake_s = self.wake_s
        due_s = at_most_s if wake_s is None else wake_s - self._read_clock_s()
        return min(at_most_s, max(_MIN_IDLE_S, due_s))

    # -- work --------------------------------------------------------------------------------

    def work_together(self) -> bool:
        """Compute a piece of every device that has one, in the time of the longest.

        For a virtual clock: as if each device had a server of its own. False when there is none.
        """
        coordinator = self._coordinator
        pieces = coordinator.all_work() if coordinator is not None else []
        if not pieces or coordinator is None or self.finished or self._spend is None:
            return False
        waiting, number, begin_s = coordinator.waiting, coordinator.round, self._read_clock_s()
        self._spend(pieces)
        seconds = self._read_clock_s() - begin_s
        self.ledger.worked(pieces, number, begin_s, seconds, waiting=waiting)
        steps = [piece for piece in pieces if isinstance(piece, Step)]
        actions: list[Action] = []
        for group in _by_slots(steps):
            actions += self._step(group, coordinator, begin_s)
        for piece in pieces:
            if isinstance(piece, Measure):
                actions += self._measure(piece, coordinator)
        self._perform(actions)
        return True

    def work(self) -> bool:
        """Compute one piece of work, or a batch of steps; False when there is none."""
        work = self._coordinator.next_work() if self._coordinator is not None else None
        if work is None or self._coordinator is None or self.finished:
            return False
        waiting = self._coordinator.waiting
        begin_s = self._read_clock_s()
        number = self._coordinator.round
        pieces: Sequence[Work]
        if isinstance(work, Step):
            pieces = steps = self._coordinator.batch(work)
            if self._spend is not None:
                self._spend(pieces)
            actions = self._step(steps, self._coordinator, begin_s)
        else:
            pieces = [work]
            if self._spend is not None:
                self._spend(pieces)
            actions = self._measure(work, self._coordinator)
        seconds = self._read_clock_s() - begin_s
        self.ledger.worked(pieces, number, begin_s, seconds, waiting=waiting)
        self._perform(actions)
        return True

    def _step(self, steps: list[Step], coordinator: AnyCoordinator, begin_s: float) -> list[Action]:
        if isinstance(coordinator, AsynchronousCoordinator) and not steps[0].step:
            # Its directions are those of its version; the size is that of the commit it becomes.
            version = coordinator.version(steps[0].device)
            self._half.start_round(
                version, self.config.method.eta_s * self._factor(coordinator.round)
            )
        rows = self._bench.step(
            steps, coordinator.round, coordinator.pool, last=coordinator.is_last(steps[0])
        )
        pad_s = self.config.server.min_step_s - (self._read_clock_s() - begin_s)
        if pad_s > 0 and self._spend is None:
            time.sleep(pad_s)
        coordinator.step_took(self._read_clock_s() - begin_s)
        actions: list[Action] = []
        for step, scalars in zip(steps, rows, strict=True):
            # Only the last can close the round: those behind it are not complete.
            actions += coordinator.stepped(step.device, scalars, self._read_clock_s())
        return actions

    def _measure(self, work: Measure, coordinator: AnyCoordinator) -> list[Action]:
        scalars = self._bench.measure(work, coordinator.pool)
        return coordinator.measured(work.device, work.first_k, scalars, self._read_clock_s())

    def _send_gradient(self, device: int, number: int) -> None:
        """Send, or send again, dL/dh at the stepped copy."""
        assert self._coordinator is not None
        gradient = self._bench.gradient(device, self._coordinator.pool)
        if not np.isfinite(gradient).all():  # no device takes that
            self._unanswerable.append((device, number))
            return
        frame = Frame(
            FrameKind.CUT_GRADIENT, self.header.run, 0, number, 0, gradient,
            np.empty(0, np.uint32), self.config.wire.encoding,
        )  # fmt: skip
        self._outbox.send_frame(device, frame)

    # -- actions -----------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case OpenRound() | OpenShare():
                    self._open(action)
                case Remind():
                    message = Round(self.header.run, action.round, action.participants)
                    self._outbox.send(action.device, message)
                case SendGradient():
                    self._send_gradient(action.device, action.round)
                case Reply():
                    self._bench.gradients.pop(action.device, None)
                    payload = np.asarray(action.scalars, "<f4").tobytes()
                    self._outbox.send(
                        action.device, Scalars(self.header.run, action.round, payload)
                    )
                case CloseRound():
                    self._close(action)
                case Ignore():
                    self.ledger.useless("duplicate" if action.why == "duplicate" else "late")
                case Finish():
                    self.finished = action
        if self._closed is not None:  # the devices compute meanwhile
            settled, self._closed = self._closed, None
            self._settle(*settled)
        self._give_up_unanswerable()

    def _give_up_unanswerable(self) -> None:
        """Take gradients that are not finite as answered by scalars that are none either."""
        while self._unanswerable and self._coordinator is not None and self.finished is None:
            device, number = self._unanswerable.pop()
            nothing = [math.nan] * self.directions
            now_s = self._read_clock_s()
            self._perform(self._coordinator.derivatives(device, number, nothing, now_s))

    def _open(self, opened: OpenRound | OpenShare) -> None:
        if isinstance(opened, OpenShare):
            self._open_share(opened)
            return
        # Also when a round that lost everybody is opened again: nothing of it counts.
        self._bench.clear()
        self._half.start_round(opened.round, self.config.method.eta_s * self._factor(opened.round))
        self._outbox.broadcast(Round(self.header.run, opened.round, opened.participants))

    def _open_share(self, opened: OpenShare) -> None:
        self._bench.clear_device(opened.device)
        self._outbox.send(opened.device, Round(self.header.run, opened.round, [opened.device]))

    def _factor(self, number: int) -> float:
        return step_factor(self.config.method.schedule, number, self.config.run.rounds)

    def _close(self, closed: CloseRound) -> None:
        self._committing = True
        bench = self._bench
        record = close_record(closed, self.config, bench.stepped)
        self.ledger.used(closed.round, bench.frames_of(closed))
        devices = [share.device for share in record.shares]
        client_factor = self.guards.adapt_client(devices)
        record = msgspec.structs.replace(record, eta_c=record.eta_c * client_factor)
        record, self.server, self._client, found = settle(
            record, self.header, self._after, self.server, self._client, self._generator,
            bench.searches(record),
        )  # fmt: skip
        if isinstance(self._half, FirstHalf):
            self._half.commit(record.eta_g * server_weight(record))
        else:
            self._half.load(self.server)
        found |= {"client_factor": client_factor, **self.guards.losses(devices)}
        # Curvature grows fastest in the first rounds: 0, 1, 2, 4, 8, ..
        due = not closed.round & (closed.round - 1) or self._due(closed.round)
        if devices and due and isinstance(self._half, ServerHalf):
            found["curvature_server"] = self._curvature(self._half, devices)
        guarded = self.guards.report(closed.round, devices, found)
        self.ledger.committed(record, guarded)
        intervened = self.guards.closed(record, guarded)
        assert self._coordinator is not None
        tau = self._coordinator.tau
        (tau.lower if self.guards.harmful else tau.raise_)()
        self.rounds_closed += 1
        self.contributions += len(closed.contributions)
        digest = sha256(self.client_state) if self._due(closed.round) else ""
        commit = client_commit(self.header.run, record, digest)
        self._commits.append(commit)
        self._commit_bytes.append(len(encode(commit)))
        self._committing = False
        self._outbox.broadcast(commit)
        self._closed = closed, self._read_clock_s(), intervened

    def _after(self, record: RoundClosed) -> Vector:
        """Server weights (d_s,) after a round as it would be journaled."""
        if isinstance(self._half, FirstHalf):
            return self._half.after(record.eta_g * server_weight(record))
        return stepped_server(record, self.header, self.server, self._generator)

    def _curvature(self, half: ServerHalf, devices: list[int]) -> float:
        """Measure the server half's curvature at its base; warn once of a step too long."""
        trace = trace_of_hessian(half, self._bench.batches_of(devices))
        text = warning(self.config.method, trace)
        if text and not self._warned:
            self._warned = True
            self._notify({"event": "warning", "text": text})
        return trace

    def _now(self) -> Checkpoint:
        """Both halves as they are before the next round."""
        now = Checkpoint(self.rounds_closed, self.client_state, self.server)
        if isinstance(self._half, FirstHalf):
            now = now._replace(optimiser=self._half.optimiser_state)
        return now

    def _due(self, number: int) -> bool:
        """True for rounds that are evaluated."""
        last = number + 1 == self.config.run.rounds
        return last or (number + 1) % self.config.evaluation.every == 0

    def _settle(self, closed: CloseRound, closed_s: float, guarded: Intervened) -> None:
        """Evaluate, checkpoint and record a closed round."""
        due = self._due(closed.round)
        if due:
            self._evaluate()
        scores = self.scores if due else None
        row = self.ledger.measured(closed, closed_s, self.config.method.tau, scores, guarded)
        self._notify({"event": "round", **row})
        self._end_if_diverged()

    def _end_if_diverged(self) -> None:
        if self.guards.diverged and not self.complete:
            self.finished = Finish(Outcome.DIVERGED, self.guards.diverged)

    def _evaluate(self) -> None:
        """Score the weights, journal their digests, and keep those that did not diverge."""
        self.scores = self._evaluator.scores(self.client, self._half)
        good = self.scores.loss <= DIVERGED_FACTOR * self._first_loss
        if not good:
            self.finished = Finish(
                Outcome.DIVERGED,
                f"test loss {self.scores.loss:.3g} after round {self.rounds_closed - 1} against "
                f"{self._first_loss:.3g} at the start; use smaller steps",
            )
        keep = good and not self.guards.doubtful
        now = self._now()
        self.ledger.verified(now, keep=keep)
        if keep:
            self.ledger.limit_frames(self.config.server.frames_mb << 20, now)

    def _catch_up(self, history: History) -> None:
        """Do for the last round what the server was stopped in, after its commit."""
        self._half.load(self.server)
        rounds = history.past.rounds
        due = self._due(len(rounds) - 1)
        if due and len(rounds) not in history.past.digests:
            self._evaluate()
        elif due:
            self.scores = self._evaluator.scores(self.client, self._half)
        self.ledger.catch_up(rounds, self.config.method.tau, self.scores if due else None)
        self._end_if_diverged()
        self._history = None

    def stop(self) -> None:
        """Nothing that is told from now on changes the run, not even one that is cut short."""
        if self._coordinator is not None and self._coordinator.finished is None:
            self._coordinator = None

    def close(self, reason: str) -> None:
        """End the journal and close all files; in the middle of a commit as a kill would."""
        self.ledger.close(reason, None if self._committing else self._now())


def _by_slots(steps: list[Step]) -> list[list[Step]]:
    """The steps in as few groups as possible, none with two of a slot."""
    groups: list[dict[int, Step]] = []
    for step in steps:
        free = next((group for group in groups if step.slot not in group), None)
        if free is None:
            groups.append(free := {})
        free[step.slot] = step
    return [list(group.values()) for group in groups]
