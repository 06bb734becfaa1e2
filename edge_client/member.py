"""A device within one run: the rounds that it computes, the commits that it replays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from edge_client.blobs import BlobFetch
from edge_client.commit_queue import CommitQueue, own_round
from edge_client.fetching import Fetching
from edge_client.files import as_octets
from edge_client.memory import memory_bytes
from edge_client.open_round import OpenRound
from edge_client.power.source import EnergySource
from edge_client.state import SavedWeights, StateStore
from edge_client.trainer import Trainer
from edge_client.uplink import Uplink
from wire_protocol.energy import MeasuredByPhase, NoEnergy
from wire_protocol.errors import RefusedError
from wire_protocol.frames import Frame
from wire_protocol.messages import Commit, Round, Scalars, Snapshot, Welcome

# Weights are saved at most this often: SD cards wear out.
_SAVE_EVERY_S: Final = 5.0
# How long what was asked for may be under way before a gap makes the device ask again.
_GAP_S: Final = 1.0

Training = Round | Commit | Snapshot | Scalars


class Member:
    """Takes the run's messages in any order, and repeated ones. `trainer` stands at a round.

    Whatever sends raises QueueFullError or TransportError, whatever saves or fetches StateError.
    """

    def __init__(
        self, trainer: Trainer, epoch: int, store: StateStore, uplink: Uplink, fetching: Fetching,
        energy: EnergySource, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._trainer, self._epoch, self._store = trainer, epoch, store
        self._uplink, self._fetching = uplink, fetching
        self._energy, self._say = energy, say
        self._asynchronous = trainer.welcome.asynchronous
        self._open = OpenRound(epoch, uplink.send_frame, uplink.send)
        self._later = CommitQueue()
        self._metered = False  # the run's energy is being counted
        self._saved_s = -math.inf
        self._advanced_s = 0.0  # when `ready` was said, or a commit came
        self._mismatch_round: int | None = None
        self._acknowledged_round: int | None = None

    @property
    def run(self) -> int:
        """The run's id."""
        return self._trainer.welcome.run

    @property
    def computing(self) -> bool:
        """True while there is something to compute."""
        return self._open.computing

    @property
    def busy(self) -> bool:
        """True while there is something to compute or to send again."""
        return self._open.busy

    def advance(self) -> bool:
        """A little further with the open round; True when something was computed."""
        return self._open.advance()

    def ready(self) -> None:
        """Tell the server where this device stands: it sends what is missing."""
        self._advanced_s = time.monotonic()
        self._uplink.ready(self._trainer)

    def repeat(self) -> None:
        """Nothing came for a while: say again what may have been lost."""
        self._open.answer_again()
        self.ready()

    def welcomed_back(self, welcome: Welcome) -> None:
        """The server may be another start of it, which knows nothing of the open round.

        Raises BundleError when the initial weights are gone.
        """
        self._acknowledged_round = None
        if self._trainer.next_round > welcome.next_round:  # it lost commits
            self._say(f"the server is back at round {welcome.next_round}: starting over")
            self._trainer.start_over()
            self._drop_all()
        self.ready()

    def take_snapshot(self, fetch: BlobFetch) -> None:
        """The weights that were fetched stand for the commits up to them."""
        snapshot, scratch = self._fetching.snapshot, self._trainer.scratch
        if snapshot is not None:
            whole = fetch.finish(as_octets(scratch))
            if whole and self._trainer.restore(scratch, snapshot.next_round):
                self._drop_all()
        self._fetching.drop()
        self.ready()

    def take_gradient(self, frame: Frame) -> None:
        """The cut gradient of the open round: answer it, again when it comes again.

        Raises HeaderError when it is none of this run.
        """
        trainer = self._trainer
        trainer.check_gradient(frame)
        late = frame.round != trainer.next_round or frame.round == self._acknowledged_round
        if not late and self._fetching.snapshot is None:
            self._open.take_gradient(frame, trainer)

    def take(self, message: Training, *, sending: bool) -> None:
        """A message of the run; `sending`: the link has not delivered what it was given.

        Raises RefusedError when commits lead to other weights than the server's, twice.
        """
        self._meter_run()
        trainer = self._trainer
        match message:
            case _ if self._fetching.snapshot is not None:
                pass  # the fetch under way comes first; what it leaves missing is asked for after
            case _ if self._asynchronous and self._puts_off(message):
                pass
            case Snapshot() if (
                message.next_round > trainer.next_round
                and message.size_bytes == trainer.state.nbytes
            ):
                self._fetching.fetch_snapshot(message)
            case Commit() if message.round == trainer.next_round:
                self._commit(message)
            case Scalars() if message.round == trainer.next_round:
                self._acknowledged_round = message.round
                self._open.drop()
                self._apply_later()
            case Round() if message.round == trainer.next_round != self._acknowledged_round:
                if trainer.welcome.device in message.participants:
                    self._open.take_part(trainer, again=not sending)
            case Round() | Commit() if message.round > trainer.next_round:
                if time.monotonic() - self._advanced_s > _GAP_S:
                    self.ready()
            case _:
                pass

    def end(self) -> str:
        """The run is over. Returns why its energy was not measured, or ''. Raises as `take`."""
        self._apply_later()
        self._report(self._trainer.next_round, 0.0)
        self.save()  # what the device has learned stays on its disk
        energy = self._energy.so_far()
        if isinstance(energy, MeasuredByPhase):
            return ""
        return energy.reason if isinstance(energy, NoEnergy) else energy.model

    def save(self) -> None:
        """Keep the weights on the disk."""
        self._saved_s = time.monotonic()
        trainer = self._trainer
        self._store.save_weights(SavedWeights(self.run, trainer.next_round, trainer.state))

    def _meter_run(self) -> None:
        """The run's energy counts from its first message on."""
        if not self._metered:
            self._metered = True
            self._energy.begin()

    def _drop_all(self) -> None:
        self._open.drop()
        self._later.take()

    def _puts_off(self, message: Training) -> bool:
        """Asynchronous: True for a commit that has to wait, because its weights are in use.

        They are free when a commit holds the share that is being computed, or when the server has
        given it up and asks for a newer one.
        """
        trainer = self._trainer
        match message:
            case Commit() if self._open.in_use:
                if own_round(message, trainer.welcome.device) != trainer.next_round:
                    self._later.add(message, trainer.next_round)
                    return True
                self._open.drop()
                self._apply_later()
            case Round() if 0 < message.round - trainer.next_round <= len(self._later):
                self._open.drop()
                self._apply_later(message.round - trainer.next_round)
            case _:
                pass
        return False

    def _apply_later(self, count: int | None = None) -> None:
        """Replay what waited; `count`: only the first ones of it."""
        for commit in self._later.take(count):
            if commit.round == self._trainer.next_round:
                self._commit(commit)

    def _commit(self, commit: Commit) -> None:
        trainer = self._trainer
        self._open.drop()
        replay_s = trainer.apply(commit)
        reported = commit.round
        if self._asynchronous:  # of others' commits there is nothing to tell
            own = own_round(commit, trainer.welcome.device)
            reported = own if own is not None and own == self._open.begun else -1
        if reported >= 0:
            self._report(reported, replay_s)
        self._advanced_s = time.monotonic()
        if trainer.next_round == 0:
            self._differs(commit.round)
        elif self._asynchronous and reported >= 0:
            self.ready()  # for the next share
        if time.monotonic() - self._saved_s >= _SAVE_EVERY_S:
            self.save()

    def _differs(self, number: int) -> None:
        """A commit led to other weights than the server's: from the beginning, once."""
        if self._mismatch_round == number:
            raise RefusedError(
                f"this machine computes other weights than the server's in round {number}, twice: "
                "its float arithmetic is not IEEE-754, or its memory is faulty"
            )
        self._mismatch_round = number
        self._say(f"weights differ from the server's after round {number}: starting over")
        self.ready()

    def _report(self, round_number: int, replay_s: float) -> None:
        self._uplink.send(
            self._trainer.report(
                self._epoch, round_number, self._open.started_unix_s, replay_s,
                stream=self._uplink.run_bytes(), bundle=self._fetching.bundle_bytes,
                rss=memory_bytes(), energy=self._energy.so_far(),
            )
        )  # fmt: skip
