"""Both halves of a run between rounds: their weights, the commit of a round, and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from server_node.actions import CloseRound, Finish, Outcome
from server_node.backtracking import Searches, settle, stepped_server
from server_node.checkpoint import Checkpoint
from server_node.config import Config
from server_node.curvature import trace_of_hessian, warning
from server_node.evaluation import Evaluator
from server_node.first_half import FirstHalf
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
from wire_protocol.directions import DirectionGenerator
from wire_protocol.manifest import sha256
from wire_protocol.messages import Commit, encode

Vector = NDArray[np.float32]

# A test loss this many times the first one never came back in any run seen.
DIVERGED_FACTOR: Final = 10.0


class Halves:
    """The weights of a run, and what changes and judges them. No messages, no clock."""

    def __init__(
        self, config: Config, header: Header, half: ServerHalf | FirstHalf, evaluator: Evaluator,
        client: Vector, server: Vector, ledger: Ledger, notify: Callable[[dict[str, Any]], None],
        history: History | None,
    ) -> None:  # fmt: skip
        """`client` (d_c,) and `server` (d_s,) are the initial weights; they are not written to."""
        self._config, self._header, self._ledger = config, header, ledger
        self._half, self._evaluator, self._notify = half, evaluator, notify
        self._initial = client, server
        self._client = (
            ClientState(header.client_rule, client) if history is None else history.client
        )
        self.server = server.copy() if history is None else history.server
        self.scores: Scores | None = None
        closed = history.past.rounds if history is not None else []
        self._last = closed[-1] if closed else None
        self.rounds_closed, self.contributions = len(closed), sum(len(r.shares) for r in closed)
        self._commits: list[Commit] = history.commits if history is not None else []
        self._commit_bytes = [len(encode(commit)) for commit in self._commits]
        self._committing = False  # between weights and journal: neither tells of the other
        self._first_loss = math.inf
        self._generator = DirectionGenerator()
        past = history.past.journal.records if history is not None else ()
        self.guards = Guards(config.guards, past)
        self.bench = Workbench(config, half, self.guards)
        if history is not None and history.first is not None:
            self.bench.restore(history.first)
        self._warned = self.guards.curvature is not None and bool(
            warning(config.method, self.guards.curvature)
        )

    @property
    def client(self) -> ClientState:
        """The client half as devices have it that applied all commits; not to be written to."""
        return self._client

    def score_initial(self) -> None:
        """Score the initial weights: what later scores are judged by."""
        client, server = self._initial
        self._half.load(server)
        self.scores = self._evaluator.scores(client, self._half)
        self._first_loss = self.scores.loss

    def catch_up(self, history: History) -> Finish | None:
        """Do for the last round what the server was stopped in, after its commit."""
        self._half.load(self.server)
        rounds = history.past.rounds
        due = self._due(len(rounds) - 1)
        finish = None
        if due and len(rounds) not in history.past.digests:
            finish = self._evaluate()
        elif due:
            self.scores = self._evaluator.scores(self._client.theta, self._half)
        self._ledger.catch_up(rounds, self._config.method.tau, self.scores if due else None)
        return self._verdict() or finish

    def start_round(self, version: int, number: int) -> None:
        """Round `number` begins, on the directions of round `version`."""
        eta_s = self._config.method.eta_s * self._factor(number) * self.guards.server_factor
        self._half.start_round(version, eta_s)

    def missed_commits(self, next_round: int) -> list[Commit] | None:
        """What a device lacks that waits for `next_round`; None when a snapshot is cheaper.

        Of weights that are none (model.perturb "none") there is no snapshot.
        """
        known = next_round <= len(self._commits)
        size_bytes = self._client.state.nbytes
        if not known or 0 < size_bytes < sum(self._commit_bytes[next_round:]):
            return None
        return self._commits[next_round:]

    def close(self, closed: CloseRound) -> tuple[Commit, Intervened]:
        """Apply a round to both halves and journal it; the commit is for the devices."""
        self._committing = True
        record = close_record(closed, self._config, self.bench.stepped)
        self._ledger.used(closed.round, self.bench.frames_of(closed))
        devices = [share.device for share in record.shares]
        client_factor = self.guards.adapt_client(devices)
        record = msgspec.structs.replace(
            record, eta_c=record.eta_c * client_factor,
            eta_s=record.eta_s * self.guards.server_factor,
        )  # fmt: skip
        searches = self.bench.searches(record)
        server_factor = self._server_factor(searches, devices)
        record, self.server, self._client, found = settle(
            record, self._header, self._after, self.server, self._client, self._generator,
            searches,
        )  # fmt: skip
        self._last = record
        if isinstance(self._half, FirstHalf):
            self._half.commit(record.eta_g * server_weight(record))
        else:
            self._half.load(self.server)
        found |= {"client_factor": client_factor, "server_factor": server_factor}
        found |= self.guards.losses(devices)
        # Curvature grows fastest in the first rounds: 0, 1, 2, 4, 8, ..
        due = not closed.round & (closed.round - 1) or self._due(closed.round)
        if devices and due and isinstance(self._half, ServerHalf):
            found["curvature_server"] = self._curvature(self._half, devices)
        guarded = self.guards.report(closed.round, devices, found)
        self._ledger.committed(record, guarded)
        intervened = self.guards.closed(record, guarded)
        self.rounds_closed += 1
        self.contributions += len(closed.contributions)
        digest = sha256(self._client.state) if self._due(closed.round) else ""
        commit = client_commit(self._header.run, record, digest)
        self._commits.append(commit)
        self._commit_bytes.append(len(encode(commit)))
        self._committing = False
        return commit, intervened

    def settle(self, closed: CloseRound) -> tuple[Scores | None, Finish | None]:
        """Evaluate and checkpoint a closed round when that is due; what the guards say of it."""
        if not self._due(closed.round):
            return None, self._verdict()
        finish = self._evaluate()
        return self.scores, self._verdict() or finish

    def checkpoint(self) -> Checkpoint | None:
        """Both halves as they are before the next round; None in the middle of a commit."""
        if self._committing:
            return None
        now = Checkpoint(self.rounds_closed, self._client.state, self.server)
        if isinstance(self._half, FirstHalf):
            now = now._replace(optimiser=self._half.optimiser_state)
        return now

    def _after(self, record: RoundClosed) -> Vector:
        """Server weights (d_s,) after a round as it would be journaled."""
        if isinstance(self._half, FirstHalf):
            return self._half.after(record.eta_g * server_weight(record))
        return stepped_server(record, self._header, self.server, self._generator)

    def _server_factor(self, searches: Searches, devices: list[int]) -> float:
        """Judge the last round's server step by this round's activations: zeroth order, barrier.

        The weights before that step are those now less the step, which its record tells: so a run
        that was stopped judges alike.
        """
        last, asynchronous = self._last, self._config.round.mode == "asynchronous"
        judged = not (asynchronous or isinstance(self._half, FirstHalf))
        if searches.server is None or last is None or not devices or not judged:
            return self.guards.server_factor
        back = msgspec.structs.replace(last, eta_s=-last.eta_s)
        before = stepped_server(back, self._header, self.server, self._generator)
        return self.guards.adapt_server(searches.server(self.server), searches.server(before))

    def _curvature(self, half: ServerHalf, devices: list[int]) -> float:
        """Measure the server half's curvature at its base; warn once of a step too long."""
        trace = trace_of_hessian(half, self.bench.batches_of(devices))
        text = warning(self._config.method, trace)
        if text and not self._warned:
            self._warned = True
            self._notify({"event": "warning", "text": text})
        return trace

    def _factor(self, number: int) -> float:
        return step_factor(self._config.method.schedule, number, self._config.run.rounds)

    def _due(self, number: int) -> bool:
        """True for rounds that are evaluated."""
        last = number + 1 == self._config.run.rounds
        return last or (number + 1) % self._config.evaluation.every == 0

    def _verdict(self) -> Finish | None:
        """The end that the guards call for, if any; a run that is complete is not ended."""
        if self.guards.diverged and self.rounds_closed < self._config.run.rounds:
            return Finish(Outcome.DIVERGED, self.guards.diverged)
        return None

    def _evaluate(self) -> Finish | None:
        """Score the weights, journal their digests, and keep those that did not diverge."""
        self.scores = self._evaluator.scores(self._client.theta, self._half)
        good = self.scores.loss <= DIVERGED_FACTOR * self._first_loss
        keep = good and not self.guards.doubtful
        now = self.checkpoint()
        assert now is not None
        self._ledger.verified(now, keep=keep)
        if keep:
            self._ledger.limit_frames(self._config.server.frames_mb << 20, now)
        if good:
            return None
        return Finish(
            Outcome.DIVERGED,
            f"test loss {self.scores.loss:.3g} after round {self.rounds_closed - 1} against "
            f"{self._first_loss:.3g} at the start; use smaller steps",
        )
