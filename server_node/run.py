"""One run: the coordinator's actions carried out, its work computed. No MQTT in here.

An `Outbox` takes the messages; the MQTT node, the in-process fleet and tests bring their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from server_node.actions import (
    Action,
    CloseRound,
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
from server_node.config import Config
from server_node.coordinator import Coordinator
from server_node.errors import FrameFaultError
from server_node.evaluation import Evaluator
from server_node.half import ActivationBatch, Scores, ServerHalf, Turn
from server_node.journal import Header, RoundClosed, Share
from server_node.ledger import Ledger
from server_node.replay import apply_client, apply_server, client_commit
from server_node.resume import History
from server_node.schedule import step_factor
from wire_protocol.client_optimiser import ClientState
from wire_protocol.directions import DirectionGenerator, directions_digest
from wire_protocol.frames import HEADER_BYTES, Frame, FrameKind
from wire_protocol.manifest import Manifest, sha256
from wire_protocol.messages import Commit, DownMessage, Round, Scalars, Snapshot, Welcome, encode

Vector = NDArray[np.float32]

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

    def offer_blob(self, data: bytes) -> str:
        """Make a blob fetchable; returns its digest."""
        ...


class Run:
    """State of one run between events. All times come from the clock it is given."""

    def __init__(
        self, config: Config, header: Header, manifest: Manifest, half: ServerHalf,
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
        self._coordinator: Coordinator | None = None
        self._commits: list[Commit] = history.commits if history is not None else []
        self._commit_bytes = [len(encode(commit)) for commit in self._commits]
        # Closed and when; recorded once the next round is on its way.
        self._closed: tuple[CloseRound, float] | None = None
        self._batches: dict[int, ActivationBatch] = {}
        self._differences: dict[tuple[int, int], Vector] = {}
        self._stepped: dict[int, list[list[float]]] = {}

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
        )  # fmt: skip
        self._coordinator = Coordinator(rules, devices, self._read_clock_s())
        self._perform(self._coordinator.start(self._read_clock_s(), self.rounds_closed))

    @property
    def complete(self) -> bool:
        """True when every round is closed."""
        return self.rounds_closed >= self.config.run.rounds

    @property
    def directions(self) -> int:
        """K that devices are asked for; a frozen client half needs none."""
        return self.config.method.directions_client if self.config.method.eta_c else 0

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
        )  # fmt: skip

    def ready(self, device: int, next_round: int) -> None:
        """A device tells its round: send what it misses, then the open round."""
        if self._coordinator is None:
            return
        known = next_round <= len(self._commits)
        if not known or sum(self._commit_bytes[next_round:]) > self.client_state.nbytes:
            digest = self._outbox.offer_blob(self.client_state.astype("<f4").tobytes())
            size_bytes = self.client_state.nbytes
            self._outbox.send(
                device, Snapshot(self.header.run, len(self._commits), digest, size_bytes)
            )
        else:
            for commit in self._commits[next_round : next_round + _CATCH_UP_COMMITS]:
                self._outbox.send(device, commit)
        self._perform(self._coordinator.joined(device, self._read_clock_s()))

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
                self._batches[device] = self._half.place(frame.tensor, frame.labels)
        else:
            count = len(frame.tensor)
            actions = coordinator.differences(device, frame.round, frame.first_k, count, now_s)
            if not actions:
                self._differences[device, frame.first_k] = frame.tensor
        self._perform(actions)

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
        for piece in pieces:
            if isinstance(piece, Step):
                self._perform(self._step([piece], coordinator))
            else:
                self._perform(self._measure(piece, coordinator))
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
            actions = self._step(steps, self._coordinator)
        else:
            pieces = [work]
            if self._spend is not None:
                self._spend(pieces)
            actions = self._measure(work, self._coordinator)
        seconds = self._read_clock_s() - begin_s
        self.ledger.worked(pieces, number, begin_s, seconds, waiting=waiting)
        self._perform(actions)
        return True

    def _step(self, steps: list[Step], coordinator: Coordinator) -> list[Action]:
        begin_s = self._read_clock_s()
        turns = [
            Turn(s.slot, s.device, self._batches[s.device], self._stepped.setdefault(s.device, []))
            for s in steps
        ]
        rows = self._half.steps(turns)
        pad_s = self.config.server.min_step_s - (self._read_clock_s() - begin_s)
        if pad_s > 0 and self._spend is None:
            time.sleep(pad_s)
        actions: list[Action] = []
        for turn, scalars in zip(turns, rows, strict=True):
            turn.done.append(scalars)
            # Only the last can close the round: those behind it are not complete.
            actions += coordinator.stepped(turn.device, scalars, self._read_clock_s())
        return actions

    def _measure(self, work: Measure, coordinator: Coordinator) -> list[Action]:
        scalars = self._half.measure(
            work.device, self._batches[work.device],
            self._differences.pop((work.device, work.first_k)), self._stepped[work.device],
        )  # fmt: skip
        return coordinator.measured(work.device, work.first_k, scalars, self._read_clock_s())

    # -- actions -----------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case OpenRound():
                    self._open(action)
                case Remind():
                    message = Round(self.header.run, action.round, action.participants)
                    self._outbox.send(action.device, message)
                case Reply():
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
            (closed, closed_s), self._closed = self._closed, None
            self._settle(closed, closed_s)

    def _open(self, opened: OpenRound) -> None:
        # Also when a round that lost everybody is opened again: nothing of it counts.
        self._batches.clear()
        self._differences.clear()
        self._stepped.clear()
        factor = step_factor(self.config.method.schedule, opened.round, self.config.run.rounds)
        self._half.start_round(opened.round, self.config.method.eta_s * factor)
        self._outbox.broadcast(Round(self.header.run, opened.round, opened.participants))

    def _close(self, closed: CloseRound) -> None:
        method = self.config.method
        factor = step_factor(method.schedule, closed.round, self.config.run.rounds)
        weight = 1.0 / max(1, len(closed.contributions))
        shares = [
            Share(
                c.device, weight, np.asarray(c.client_scalars, "<f4").tobytes(), weight,
                np.asarray(c.server_scalars, "<f4").tobytes(), method.directions_server,
            )
            for c in closed.contributions
        ]  # fmt: skip
        record = RoundClosed(
            closed.round, method.eta_c * factor, method.eta_s * factor, method.eta_g, shares
        )
        self.ledger.committed(record)
        apply_client(self._client, self.header, record, self._generator)
        apply_server(self.server, self.header, record, self._generator)
        self._half.load(self.server)
        self.rounds_closed += 1
        self.contributions += len(closed.contributions)
        digest = sha256(self.client_state) if self._due(closed.round) else ""
        commit = client_commit(self.header.run, record, digest)
        self._commits.append(commit)
        self._commit_bytes.append(len(encode(commit)))
        self._outbox.broadcast(commit)
        self._closed = closed, self._read_clock_s()

    def _due(self, number: int) -> bool:
        """True for rounds that are evaluated."""
        last = number + 1 == self.config.run.rounds
        return last or (number + 1) % self.config.evaluation.every == 0

    def _settle(self, closed: CloseRound, closed_s: float) -> None:
        """Evaluate, checkpoint and record a closed round."""
        due = self._due(closed.round)
        if due:
            self._evaluate()
        scores = self.scores if due else None
        row = self.ledger.measured(closed, closed_s, self.config.method.tau, scores)
        self._notify({"event": "round", **row})

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
        self.ledger.verified(self.rounds_closed, self.client_state, self.server, keep=good)

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
        self._history = None

    def close(self, reason: str) -> None:
        """End the journal and close all files."""
        self.ledger.close(reason, self.rounds_closed, self.client_state, self.server)


def check_frame(frame: Frame, config: Config, manifest: Manifest) -> None:
    """Raise FrameFaultError unless a frame's encoding, shape, labels and values fit the run."""
    if frame.encoding not in (config.wire.encoding, "float32"):  # float32 holds what others cannot
        raise FrameFaultError(f"frame in {frame.encoding}, the run wants {config.wire.encoding}")
    batch = config.devices.batch
    shape = (batch, *manifest.activation.shape)
    name = frame.kind.name.lower()
    activation = frame.kind is FrameKind.ACTIVATION
    have = frame.tensor.shape if activation else frame.tensor.shape[1:]
    labels = batch if activation else 0
    if have != shape or len(frame.labels) != labels or not len(frame.tensor):
        raise FrameFaultError(
            f"{name} of shape {frame.tensor.shape} with {len(frame.labels)} labels, the run wants "
            f"{shape} with {labels}"
        )
    if activation and int(frame.labels.max()) >= manifest.classes:
        raise FrameFaultError(
            f"label {int(frame.labels.max())} is outside 0..{manifest.classes - 1}"
        )
    if not np.isfinite(frame.tensor).all():
        raise FrameFaultError(f"{name} holds values that are not finite")
