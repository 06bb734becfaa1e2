"""The agent: joins a fleet, gets the bundle, takes part in runs, survives.

One loop, one thread (the link has its own). Every message may be lost, repeated, late or out of
order: the agent repeats what got no answer, and ignores what it already knows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Final

from edge_client.blobs import BundleFetch
from edge_client.bundle import Bundle, read_bundle
from edge_client.errors import BundleError
from edge_client.fetching import Fetching
from edge_client.member import Member
from edge_client.power.phases import RADIO, WAIT
from edge_client.power.source import EnergySource
from edge_client.settings import AgentSettings
from edge_client.shard import Shard
from edge_client.start import start_trainer
from edge_client.state import StateStore
from edge_client.uplink import Uplink
from edge_client.watch import Watch
from wire_protocol.directions import directions_digest
from wire_protocol.errors import ProtocolError, RefusedError, TransportError
from wire_protocol.frames import MAGIC as FRAME_MAGIC
from wire_protocol.frames import Frame, decode_frame
from wire_protocol.messages import (
    Chunk,
    Commit,
    DownMessage,
    End,
    Hello,
    Refused,
    Round,
    Scalars,
    Snapshot,
    Welcome,
    decode_down,
)
from wire_protocol.mqtt import Connected, Disconnected, LinkLike
from wire_protocol.mqtt_stream import Payload

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
        self._shard = shard
        self._store = store
        self._link = link
        self._say = say
        self._energy = energy
        self._stopwatch = energy.stopwatch
        self.unmeasured = ""  # why a run's energy was not measured
        self._alive = alive
        self._epoch = epoch
        self._own_bundle = settings.read_bundle()
        self._welcome: Welcome | None = None
        self._member: Member | None = None  # once the bundle is here
        self._watch = Watch(settings.fleet, settings.wait_s, settings.offline_s)
        self._uplink = Uplink(link, settings.fleet, settings.device_id, epoch, energy.stopwatch)
        self._fetching = Fetching(
            store, self._uplink.send, self._uplink.stream, signed=settings.identity is not None
        )
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
            if self._member is not None:
                self._member.save()
        return self._finished.reason

    def leave(self, reason: str) -> None:
        """Say goodbye (best effort)."""
        self._uplink.leave(reason)

    def _turn(self) -> None:
        """One piece of work, if there is any, then one event."""
        self._alive()
        crowded = self._link.backlog > _BACKLOG
        # Computing is no silence of the server's. A commit is noticed between two pieces.
        if not crowded and self._member is not None and self._member.advance():
            self._watch.heard()
        event = self._link.next_event(self._rest(crowded=crowded))
        self._stopwatch.enter(WAIT)
        if isinstance(event, Connected):
            self._watch.connected()
            self._uplink.join(self._shard)
        elif isinstance(event, Disconnected):
            self._lost(event)
        elif event is not None:
            self._receive(event.payload)
        self._check_time()

    def _rest(self, *, crowded: bool) -> float:
        """How long to wait for an event; what is under way meanwhile is the radio's time."""
        under_way = self._watch.online and self._link.backlog > 0
        self._stopwatch.enter(RADIO if under_way or self._fetching.under_way else WAIT)
        if self._member is not None and self._member.busy:
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
        asynchronous = self._welcome is not None and self._welcome.asynchronous
        self._watch.heard(answer=not (isinstance(message, Commit) and asynchronous))
        self._handle(message)

    def _take_gradient(self, frame: Frame) -> None:
        member = self._member
        if member is not None and frame.run == member.run and frame.epoch == self._epoch:
            member.take_gradient(frame)
            self._watch.heard()

    def _handle(self, message: DownMessage) -> None:
        match message:
            case Hello():
                self._uplink.join(self._shard)
            case Refused() if message.epoch == self._epoch:
                raise RefusedError(f"the server refused this device: {message.reason}")
            case Welcome() if message.epoch == self._epoch:
                self._welcomed(message)
            case Chunk():
                self._take_chunk(message)
            case End() if self._welcome is not None and message.run == self._welcome.run:
                self._end(message)
            case Round() | Commit() | Snapshot() | Scalars() if self._member is not None:
                if message.run == self._member.run:
                    self._member.take(message, sending=self._link.backlog > 0)
            case _:
                pass

    def _welcomed(self, welcome: Welcome) -> None:
        if self._welcome is not None and self._welcome.run == welcome.run:
            if self._member is not None:
                self._member.welcomed_back(welcome)
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
            self._start(bundle, welcome)
        elif self._settings.bundle is not None:
            raise BundleError(
                f"{self._settings.bundle}: another bundle than the run's "
                f"({welcome.manifest_sha256[:12]}); leave out --bundle to fetch it"
            )
        else:
            self._say(f"fetching bundle {welcome.manifest_sha256[:12]}")
            self._fetching.fetch_bundle(welcome.manifest_sha256, welcome.manifest_bytes)

    def _take_chunk(self, chunk: Chunk) -> None:
        whole = self._fetching.take(chunk)
        if isinstance(whole, BundleFetch):
            if self._welcome is not None:
                self._start(read_bundle(whole.folder), self._welcome)
        elif whole is not None and self._member is not None:
            self._member.take_snapshot(whole)

    def _start(self, bundle: Bundle, welcome: Welcome) -> None:
        trainer = start_trainer(
            self._settings, welcome, bundle, self._shard, self._store, self._stopwatch, self._say
        )
        self._member = Member(
            trainer, self._epoch, self._store, self._uplink, self._fetching, self._energy,
            self._say,
        )  # fmt: skip
        self._member.ready()

    def _end(self, end: End) -> None:
        if self._member is not None:
            reason = self._member.end()
            self.unmeasured = self.unmeasured or reason
        self._forget_run()
        if end.final:
            self._finished = end

    def _forget_run(self) -> None:
        """Nothing of this run counts for the next one, its bytes included."""
        self._fetching.forget_run()
        self._welcome = self._member = None
        self._uplink.count_anew()

    # -- time --------------------------------------------------------------------------------

    def _check_time(self) -> None:
        self._watch.check()
        computing = self._member is not None and self._member.computing
        if self._link.backlog:  # the broker has it or asks for it again; a slow link takes its time
            self._watch.busy_sending()
        elif not computing and self._watch.repeat_due(self._fetching.progress_s):
            self._repeat()

    def _repeat(self) -> None:
        self._fetching.again()
        if self._fetching.under_way:
            return
        if self._member is not None:
            self._member.repeat()
        else:
            self._uplink.join(self._shard)

    def _lost(self, event: Disconnected) -> None:
        if event.fatal:
            raise TransportError(f"broker closed the connection: {event.reason}")
        self._say(f"broker lost ({event.reason}), reconnecting")
        self._watch.lost()
