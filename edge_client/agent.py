"""The agent: joins a fleet, gets the bundle, answers rounds, replays commits, survives.

One loop, one thread (the link has its own). Every message may be lost, repeated, late or out of
order: the agent repeats what got no answer, and ignores what it already knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Final

from edge_client.blobs import BlobFetch, BundleFetch
from edge_client.bundle import Bundle, read_bundle
from edge_client.commit_queue import CommitQueue, own_round
from edge_client.errors import BundleError
from edge_client.fetching import Fetching
from edge_client.files import as_octets
from edge_client.memory import memory_bytes
from edge_client.open_round import OpenRound
from edge_client.pacing import PacedSession
from edge_client.power.phases import RADIO, WAIT
from edge_client.power.source import EnergySource
from edge_client.session import ClientSession
from edge_client.settings import AgentSettings
from edge_client.shard import Shard, check_shard
from edge_client.state import SavedWeights, StateStore
from edge_client.trainer import Trainer
from edge_client.watch import Watch
from wire_protocol.directions import directions_digest
from wire_protocol.energy import MeasuredByPhase, NoEnergy
from wire_protocol.errors import ProtocolError, RefusedError, TransportError
from wire_protocol.frames import MAGIC as FRAME_MAGIC
from wire_protocol.frames import Frame, decode_frame
from wire_protocol.messages import (
    Chunk,
    Commit,
    DownMessage,
    End,
    Hello,
    Join,
    Leave,
    Ready,
    Refused,
    Round,
    Scalars,
    Snapshot,
    UpMessage,
    Welcome,
    decode_down,
    encode,
)
from wire_protocol.mqtt import Connected, Disconnected, LinkLike
from wire_protocol.mqtt_stream import Payload
from wire_protocol.topics import PROTOCOL_VERSION, Topics

# Weights are saved at most this often: SD cards wear out.
_SAVE_EVERY_S: Final = 5.0
# How long what was asked for may be under way before a gap makes the agent ask again.
_GAP_S: Final = 1.0
# Messages that the broker has not acknowledged, above which the agent computes and sends nothing:
# a frame may go in hundreds of parts.
_BACKLOG: Final = 256
_CROWDED_S: Final = 0.02
_IDLE_S: Final = 0.25


class Agent:
    """One device of a fleet. `run` returns the reason the run ended with."""

    def __init__(
        self,
        settings: AgentSettings,
        epoch: int,
        shard: Shard,
        store: StateStore,
        link: LinkLike,
        say: Callable[[str], None],
        energy: EnergySource,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._topics = Topics(settings.fleet)
        self._shard = shard
        self._store = store
        self._link = link
        self._say = say
        self._energy = energy
        self._stopwatch = energy.stopwatch
        self._metered = False  # the run's energy is being counted
        self.unmeasured = ""  # why a run's energy was not measured
        self._alive = alive
        self._epoch = epoch
        self._own_bundle = settings.read_bundle()
        self._welcome: Welcome | None = None
        self._trainer: Trainer | None = None
        self._watch = Watch(settings.fleet, settings.wait_s, settings.offline_s)
        self._fetching = Fetching(
            store, self._send, self._stream, signed=settings.identity is not None
        )
        self._open = OpenRound(epoch, self._publish_frame, self._send)
        self._later = CommitQueue()
        self._run_began = (0, 0)  # stream bytes, up and down
        self._saved_s = time.monotonic()
        self._advanced_s = 0.0  # when `ready` was said, or a commit came
        self._mismatch_round: int | None = None
        self._acknowledged_round: int | None = None
        self._finished: End | None = None

    def run(self) -> str:
        """Take part until the server ends the run; the link's Connected event starts it.

        Raises RefusedError, StalledError, TransportError, and the input errors of this room.
        """
        try:
            while self._finished is None:
                self._turn()
        finally:
            self._fetching.drop()
            self._save(force=True)
        return self._finished.reason

    def leave(self, reason: str) -> None:
        """Say goodbye (best effort)."""
        self._send(Leave(self._epoch, reason))

    def _turn(self) -> None:
        """One piece of work, if there is any, then one event."""
        self._alive()
        crowded = self._link.backlog > _BACKLOG
        if not crowded:
            self._advance()
        event = self._link.next_event(self._rest(crowded=crowded))
        self._stopwatch.enter(WAIT)
        if isinstance(event, Connected):
            self._watch.connected()
            self._join()
        elif isinstance(event, Disconnected):
            self._lost(event)
        elif event is not None:
            self._receive(event.payload)
        self._check_time()

    def _rest(self, *, crowded: bool) -> float:
        """How long to wait for an event; what is under way meanwhile is the radio's time."""
        under_way = self._watch.online and self._link.backlog > 0
        self._stopwatch.enter(RADIO if under_way or self._fetching.under_way else WAIT)
        if self._open.busy:
            return _CROWDED_S if crowded else 0.0
        return _CROWDED_S if under_way else _IDLE_S

    # -- what arrives ------------------------------------------------------------------------

    def _receive(self, payload: Payload) -> None:
        try:
            if bytes(payload[: len(FRAME_MAGIC)]) == FRAME_MAGIC:
                self._take_gradient(decode_frame(payload))
                return
            message = decode_down(payload)
        except ProtocolError as error:
            self._say(f"ignored a message: {error}")
            return
        # Asynchronous: commits of others never fall silent, and answer nothing.
        self._watch.heard(answer=not (isinstance(message, Commit) and self._asynchronous))
        self._handle(message)

    def _take_gradient(self, frame: Frame) -> None:
        """The cut gradient of the open round: answer it, again when it comes again."""
        trainer = self._trainer
        if trainer is None or frame.run != trainer.welcome.run or frame.epoch != self._epoch:
            return
        trainer.check_gradient(frame)
        self._watch.heard()
        late = frame.round != trainer.next_round or frame.round == self._acknowledged_round
        if not late and self._fetching.snapshot is None:
            self._open.take_gradient(frame, trainer)

    def _handle(self, message: DownMessage) -> None:
        match message:
            case Hello():
                self._join()
            case Refused() if message.epoch == self._epoch:
                raise RefusedError(f"the server refused this device: {message.reason}")
            case Welcome() if message.epoch == self._epoch:
                self._welcomed(message)
            case Chunk():
                self._take_chunk(message)
            case End() if self._welcome is not None and message.run == self._welcome.run:
                self._end(message)
            case Round() | Commit() | Snapshot() | Scalars() if self._trainer is not None:
                if message.run == self._trainer.welcome.run:
                    self._train(message, self._trainer)
            case _:
                pass

    def _welcomed(self, welcome: Welcome) -> None:
        if self._welcome is not None and self._welcome.run == welcome.run:
            if self._trainer is not None:
                self._welcomed_back(welcome, self._trainer)
            return
        if welcome.directions_sha256 != directions_digest(welcome.run_seed):
            raise RefusedError(
                "this build computes other directions than the server's: install the same musplit "
                f"version on both (here {version('musplit')})"
            )
        self._settings.check_signature(welcome)
        if self._welcome is not None:  # the old run's server went away without an End
            self._forget_run()
        self._welcome = welcome
        bundle = self._own_bundle or self._store.load_bundle(welcome.manifest_sha256)
        if bundle is not None and bundle.digest == welcome.manifest_sha256:
            self._start(bundle)
        elif self._settings.bundle is not None:
            raise BundleError(
                f"{self._settings.bundle}: another bundle than the run's "
                f"({welcome.manifest_sha256[:12]}); leave out --bundle to fetch it"
            )
        else:
            self._say(f"fetching bundle {welcome.manifest_sha256[:12]}")
            self._fetching.fetch_bundle(welcome.manifest_sha256, welcome.manifest_bytes)

    def _welcomed_back(self, welcome: Welcome, trainer: Trainer) -> None:
        """The server may be another start of it, which knows nothing of the open round."""
        self._acknowledged_round = None
        if trainer.next_round > welcome.next_round:  # it lost commits
            self._say(f"the server is back at round {welcome.next_round}: starting over")
            trainer.start_over()
            self._open.drop()
            self._later.take()
        self._ready()

    def _take_chunk(self, chunk: Chunk) -> None:
        whole = self._fetching.take(chunk)
        if isinstance(whole, BundleFetch):
            self._start(read_bundle(whole.folder))
        elif whole is not None:
            self._take_snapshot(whole)

    def _take_snapshot(self, fetch: BlobFetch) -> None:
        snapshot, trainer = self._fetching.snapshot, self._trainer
        if snapshot is not None and trainer is not None:
            scratch = trainer.scratch
            whole = fetch.finish(as_octets(scratch))
            if whole and trainer.restore(scratch, snapshot.next_round):
                self._open.drop()
                self._later.take()
        self._fetching.drop()
        self._ready()

    def _start(self, bundle: Bundle) -> None:
        welcome = self._welcome
        if welcome is None:
            return
        check_shard(self._shard, bundle.manifest)
        pacing = self._settings.pacing(welcome, bundle)
        if self._settings.stand_in is not None:
            board = self._settings.stand_in.board
            self._say(f"stands for {board}: {1e3 * pacing.forward_s:.3g} ms a forward")
        session = PacedSession(ClientSession(bundle, welcome.batch, self._settings.threads), pacing)
        self._trainer = Trainer(
            welcome, session, bundle, self._shard, time.monotonic, stopwatch=self._stopwatch
        )
        saved = self._store.load_weights(self._trainer.scratch)
        # Saved rounds that the server has lost count for nothing.
        if (
            saved is not None
            and saved.run == welcome.run
            and saved.next_round <= welcome.next_round
        ):
            self._trainer.restore(saved.weights, saved.next_round)
        self._say(
            f"device {welcome.device}: run {welcome.run:016x}, K {welcome.directions}, batch "
            f"{welcome.batch}, {bundle.manifest.parameters} parameters, from round "
            f"{self._trainer.next_round} of {welcome.rounds}"
        )
        self._ready()

    # -- training ----------------------------------------------------------------------------

    def _train(self, message: Round | Commit | Snapshot | Scalars, trainer: Trainer) -> None:
        self._meter_run()
        match message:
            case _ if self._fetching.snapshot is not None:
                pass  # the fetch under way comes first; what it leaves missing is asked for after
            case _ if self._asynchronous and self._puts_off(message, trainer):
                pass
            case Snapshot() if (
                message.next_round > trainer.next_round
                and message.size_bytes == trainer.state.nbytes
            ):
                self._fetching.fetch_snapshot(message)
            case Commit() if message.round == trainer.next_round:
                self._commit(message, trainer)
            case Scalars() if message.round == trainer.next_round:
                self._acknowledged_round = message.round
                self._open.drop()
                self._apply_later(trainer)
            case Round() if message.round == trainer.next_round != self._acknowledged_round:
                if trainer.welcome.device in message.participants:
                    self._open.take_part(trainer, again=not self._link.backlog)
            case Round() | Commit() if message.round > trainer.next_round:
                if time.monotonic() - self._advanced_s > _GAP_S:
                    self._ready()
            case _:
                pass

    def _meter_run(self) -> None:
        """The run's energy counts from its first message on."""
        if not self._metered:
            self._metered = True
            self._energy.begin()

    @property
    def _asynchronous(self) -> bool:
        return self._welcome is not None and self._welcome.asynchronous

    def _puts_off(self, message: DownMessage, trainer: Trainer) -> bool:
        """Asynchronous: True for a commit that has to wait, because its weights are in use.

        They are free when a commit holds the share that is being computed, or when the server has
        given it up and asks for a newer one.
        """
        match message:
            case Commit() if self._open.in_use:
                if own_round(message, trainer.welcome.device) != trainer.next_round:
                    self._later.add(message, trainer.next_round)
                    return True
                self._open.drop()
                self._apply_later(trainer)
            case Round() if 0 < message.round - trainer.next_round <= len(self._later):
                self._open.drop()
                self._apply_later(trainer, message.round - trainer.next_round)
            case _:
                pass
        return False

    def _apply_later(self, trainer: Trainer, count: int | None = None) -> None:
        """Replay what waited; `count`: only the first ones of it."""
        for commit in self._later.take(count):
            if commit.round == trainer.next_round:
                self._commit(commit, trainer)

    def _advance(self) -> None:
        """A little further; a commit is noticed in between."""
        if self._open.advance():  # computing is no silence of the server's
            self._watch.heard()

    def _publish_frame(self, payload: bytes) -> None:
        self._publish(self._topics.frame(self._settings.device_id), payload)

    def _commit(self, commit: Commit, trainer: Trainer) -> None:
        self._open.drop()
        replay_s = trainer.apply(commit)
        reported = commit.round
        if self._asynchronous:  # of others' commits there is nothing to tell
            own = own_round(commit, trainer.welcome.device)
            reported = own if own is not None and own == self._open.begun else -1
        if reported >= 0:
            self._report(reported, replay_s, trainer)
        self._advanced_s = time.monotonic()
        if trainer.next_round == 0:
            if self._mismatch_round == commit.round:
                raise RefusedError(
                    f"this machine computes other weights than the server's in round {commit.round}"
                    ", twice: its float arithmetic is not IEEE-754, or its memory is faulty"
                )
            self._mismatch_round = commit.round
            self._say(f"weights differ from the server's after round {commit.round}: starting over")
            self._ready()
        elif self._asynchronous and reported >= 0:
            self._ready()  # for the next share
        self._save()

    def _end(self, end: End) -> None:
        if self._trainer is not None:
            self._apply_later(self._trainer)
            self._report(self._trainer.next_round, 0.0, self._trainer)
            self._save(force=True)  # what the device has learned stays on its disk
            energy = self._energy.so_far()
            if not isinstance(energy, MeasuredByPhase) and not self.unmeasured:
                self.unmeasured = energy.reason if isinstance(energy, NoEnergy) else energy.model
        self._forget_run()
        if end.final:
            self._finished = end

    def _forget_run(self) -> None:
        """Nothing of this run counts for the next one, its bytes included."""
        self._fetching.forget_run()
        self._later.take()
        self._welcome = self._trainer = None
        self._metered = False
        self._open.drop()
        self._acknowledged_round = self._mismatch_round = self._open.begun = None
        self._run_began = self._stream()

    # -- time, messages, disk ----------------------------------------------------------------

    def _check_time(self) -> None:
        self._watch.check()
        if self._link.backlog:  # the broker has it or asks for it again; a slow link takes its time
            self._watch.busy_sending()
        elif not self._open.computing and self._watch.repeat_due(self._fetching.progress_s):
            self._repeat()

    def _repeat(self) -> None:
        self._fetching.again()
        if self._fetching.under_way:
            return
        if self._trainer is not None:
            self._open.answer_again()
            self._ready()
        else:
            self._join()

    def _join(self) -> None:
        self._send(
            Join(
                self._epoch, PROTOCOL_VERSION, version("musplit"), self._shard.shard_index,
                self._shard.samples,
            )
        )  # fmt: skip

    def _ready(self) -> None:
        if self._trainer is not None:
            self._advanced_s = time.monotonic()
            self._send(Ready(self._trainer.welcome.run, self._epoch, self._trainer.next_round))

    def _report(self, round_number: int, replay_s: float, trainer: Trainer) -> None:
        now, began = self._stream(), self._run_began
        self._send(
            trainer.report(
                self._epoch, round_number, self._open.started_unix_s, replay_s,
                stream=(now[0] - began[0], now[1] - began[1]),
                bundle=self._fetching.bundle_bytes, rss=memory_bytes(),
                energy=self._energy.so_far(),
            )
        )  # fmt: skip

    def _stream(self) -> tuple[int, int]:
        """Bytes of the link so far, up and down."""
        return self._link.bytes_up, self._link.bytes_down

    def _send(self, message: UpMessage) -> None:
        self._publish(self._topics.control(self._settings.device_id), encode(message))

    def _publish(self, topic: str, payload: bytes) -> None:
        self._stopwatch.enter(RADIO)
        self._link.publish(topic, payload)
        self._stopwatch.enter(WAIT)

    def _lost(self, event: Disconnected) -> None:
        if event.fatal:
            raise TransportError(f"broker closed the connection: {event.reason}")
        self._say(f"broker lost ({event.reason}), reconnecting")
        self._watch.lost()

    def _save(self, *, force: bool = False) -> None:
        now_s = time.monotonic()
        trainer = self._trainer
        if trainer is not None and (force or now_s - self._saved_s >= _SAVE_EVERY_S):
            self._saved_s = now_s
            self._store.save_weights(
                SavedWeights(trainer.welcome.run, trainer.next_round, trainer.state)
            )
