"""One run: the coordinator's actions carried out, its work computed. No MQTT in here.

An `Outbox` takes the messages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from server_node.actions import (
    Action,
    CloseRound,
    Finish,
    Ignore,
    OpenRound,
    OpenShare,
    Remind,
    Reply,
    SendGradient,
    Work,
)
from server_node.asynchronous import AsynchronousCoordinator
from server_node.computing import AnyCoordinator, Computing
from server_node.config import Config
from server_node.coordinator import Coordinator
from server_node.errors import FrameFaultError, NotFiniteError
from server_node.evaluation import Evaluator
from server_node.first_half import FirstHalf
from server_node.frame_checks import check_frame
from server_node.guards import Intervened
from server_node.half import ServerHalf
from server_node.halves import Halves
from server_node.journal import Header
from server_node.ledger import Ledger
from server_node.outbox import Outbox
from server_node.resume import History
from server_node.terms import Terms
from server_node.torch_half import Scores
from wire_protocol.frames import Frame, FrameKind
from wire_protocol.manifest import Manifest
from wire_protocol.messages import (
    Derivatives,
    Round,
    Scalars,
    Snapshot,
    Welcome,
)

Vector = NDArray[np.float32]

_MIN_IDLE_S: Final = 0.001
# Commits sent for one `ready`: the next round makes a device that still misses some ask again.
CATCH_UP_COMMITS: Final = 256


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
        self.terms = Terms(config, header, manifest)
        self._history = history
        self._read_clock_s = read_clock_s
        self.finished: Finish | None = None
        self.halves = Halves(
            config, header, half, evaluator, client, server, ledger, notify, history
        )
        self.guards, self._bench = self.halves.guards, self.halves.bench
        self._computing = Computing(
            self.halves, ledger, config.server.min_step_s, read_clock_s, spend
        )
        self._outbox, self._notify = outbox, notify
        self._coordinator: AnyCoordinator | None = None
        # Closed and when; recorded once the next round is on its way.
        self._closed: tuple[CloseRound, float, Intervened] | None = None
        self._unanswerable: list[tuple[int, int]] = []  # device and round: no finite gradient

    @property
    def client(self) -> Vector:
        """Weights (d_c,) of the client half."""
        return self.halves.client.theta

    @property
    def server(self) -> Vector:
        """Weights (d_s,) of the server half."""
        return self.halves.server

    @property
    def client_state(self) -> Vector:
        """Client weights and optimiser state: what digests are of, and snapshots carry."""
        return self.halves.client.state

    @property
    def rounds_closed(self) -> int:
        """Commits so far."""
        return self.halves.rounds_closed

    @property
    def contributions(self) -> int:
        """Of all closed rounds."""
        return self.halves.contributions

    @property
    def scores(self) -> Scores | None:
        """Of the last evaluation."""
        return self.halves.scores

    # -- events ------------------------------------------------------------------------------

    def start(self, devices: list[int]) -> None:
        """Everybody is ready: score the initial weights, open the first round, or the next."""
        self.halves.score_initial()
        if self._history is not None:
            self.finished = self.halves.catch_up(self._history)
            self._history = None
            if self.finished is not None:
                return
        kind = AsynchronousCoordinator if self.terms.asynchronous else Coordinator
        self._coordinator = kind(self.terms.rules, devices, self._read_clock_s())
        self._perform(self._coordinator.start(self._read_clock_s(), self.rounds_closed))

    @property
    def complete(self) -> bool:
        """True when every round is closed."""
        return self.rounds_closed >= self.config.run.rounds

    def welcome(self, device: int, epoch: int, manifest_bytes: int) -> Welcome:
        """What a device must know of this run."""
        return self.terms.welcome(device, epoch, manifest_bytes, self.rounds_closed)

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
        commits = self.halves.missed_commits(next_round)
        if commits is None:
            state = self.client_state
            digest = self._outbox.offer_blob(state.astype("<f4").tobytes())
            now_round = self.rounds_closed
            self._outbox.send(device, Snapshot(self.header.run, now_round, digest, state.nbytes))
        else:
            for commit in commits[:CATCH_UP_COMMITS]:
                self._outbox.send(device, commit)

    def left(self, device: int) -> None:
        """A device's connection ended."""
        if self._coordinator is not None:
            self._perform(self._coordinator.left(device, self._read_clock_s()))

    def frame(self, device: int, frame: Frame) -> None:
        """A device's tensor. Raises FrameFaultError when it does not fit this run.

        Raises NotFiniteError for one whose sender's open share is given up: it is no contribution.
        """
        coordinator = self._coordinator
        if coordinator is None:
            return
        now_s = self._read_clock_s()
        try:
            check_frame(frame, self.config, self.terms.manifest)
        except NotFiniteError:
            activation = frame.kind is FrameKind.ACTIVATION
            actions = coordinator.poisoned(device, frame.round, now_s, activation=activation)
            self._perform([action for action in actions if not isinstance(action, Ignore)])
            raise
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
        if len(scalars) != self.terms.directions:
            raise FrameFaultError(
                f"{len(scalars)} derivatives, the run wants {self.terms.directions}"
            )
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
        """As `work`, a piece of every device that has one (Computing.together)."""
        return self._work(self._computing.together)

    def work(self) -> bool:
        """Compute one piece of work, or a batch of steps; False when there is none."""
        return self._work(self._computing.one)

    def _work(self, compute: Callable[[AnyCoordinator], list[Action] | None]) -> bool:
        if self._coordinator is None or self.finished:
            return False
        actions = compute(self._coordinator)
        if actions is None:
            return False
        self._perform(actions)
        return True

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
            nothing = [math.nan] * self.terms.directions
            now_s = self._read_clock_s()
            self._perform(self._coordinator.derivatives(device, number, nothing, now_s))

    def _open(self, opened: OpenRound | OpenShare) -> None:
        if isinstance(opened, OpenShare):
            self._open_share(opened)
            return
        # Also when a round that lost everybody is opened again: nothing of it counts.
        self._bench.clear()
        self.halves.start_round(opened.round, opened.round)
        self._outbox.broadcast(Round(self.header.run, opened.round, opened.participants))

    def _open_share(self, opened: OpenShare) -> None:
        self._bench.clear_device(opened.device)
        self._outbox.send(opened.device, Round(self.header.run, opened.round, [opened.device]))

    def _close(self, closed: CloseRound) -> None:
        commit, intervened = self.halves.close(closed)
        assert self._coordinator is not None
        tau = self._coordinator.tau
        (tau.lower if self.guards.harmful else tau.raise_)()
        self._outbox.broadcast(commit)
        self._closed = closed, self._read_clock_s(), intervened

    def _settle(self, closed: CloseRound, closed_s: float, guarded: Intervened) -> None:
        """Evaluate, checkpoint and record a closed round."""
        scores, finish = self.halves.settle(closed)
        row = self.ledger.measured(closed, closed_s, self.config.method.tau, scores, guarded)
        self._notify({"event": "round", **row})
        self.finished = finish or self.finished

    def stop(self) -> None:
        """Nothing that is told from now on changes the run, not even one that is cut short."""
        if self._coordinator is not None and self._coordinator.finished is None:
            self._coordinator = None

    def close(self, reason: str) -> None:
        """End the journal and close all files; in the middle of a commit as a kill would."""
        self.ledger.close(reason, self.halves.checkpoint())
