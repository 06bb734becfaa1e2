"""The server on MQTT: one loop that takes events, computes in between, and keeps time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec.structs import replace

from server_node.actions import Outcome
from server_node.blobs import BlobShelf
from server_node.errors import FrameFaultError, LobbyError, NoProgressError
from server_node.fleet import Fleet, Member
from server_node.prepare import Experiment, open_run
from server_node.resume import History
from server_node.run import Run
from wire_protocol.errors import ProtocolError, QueueFullError, TransportError
from wire_protocol.frames import Frame, decode_frame, encode_frame
from wire_protocol.messages import (
    Derivatives,
    DownMessage,
    End,
    Fetch,
    Hello,
    Join,
    Leave,
    Ready,
    Refused,
    Report,
    UpMessage,
    decode_up,
    encode,
)
from wire_protocol.mqtt import Connected, Disconnected, LinkEvent, LinkLike, Received
from wire_protocol.topics import PROTOCOL_VERSION, Topics

# How long the end of a run waits for the devices' last reports.
LAST_REPORTS_S: Final = 5.0
# A lost broker must come back within this time.
OFFLINE_S: Final = 300.0
_POLL_S: Final = 0.05
# Longest sleep without an event while a round is open.
_IDLE_S: Final = 1.0
_EVENTS_A_TURN: Final = 64
# Messages that the broker has not acknowledged, above which no chunks are served.
_BACKLOG: Final = 256
# Refusals told a second: a flood must not fill the log too.
_REFUSALS_SAID: Final = 100


class Node:
    """Serves one experiment to a fleet. `notify` gets progress as plain dictionaries.

    `known` are the devices, by index and id, of a run that goes on. Devices with an identity take
    the bundle only with its signature.
    """

    def __init__(
        self, experiment: Experiment, link: LinkLike, notify: Callable[[dict[str, Any]], None],
        known: Sequence[tuple[int, str]] = (), bundle_signature: bytes = b"",
    ) -> None:  # fmt: skip
        self._experiment, self._link, self._notify = experiment, link, notify
        self._topics = Topics(experiment.config.run.fleet)
        self._fleet = Fleet(experiment.config.devices.count, known)
        self._bundle_signature = bundle_signature
        self._blobs = BlobShelf(experiment.client.blobs)
        self._run: Run | None = None
        self._refusals_said = (0.0, 0)  # the second, and how many in it
        self._ending = False
        self._final_reports: set[int] = set()
        self._offline_since_s: float | None = None

    # -- runs --------------------------------------------------------------------------------

    def gather(self) -> None:
        """Wait until the fleet is complete. Raises LobbyError."""
        deadline_s = time.monotonic() + self._experiment.config.round.lobby_s
        while not self._fleet.numbered():
            self._turn(_POLL_S)
            self._check_lobby(deadline_s, self._fleet.waiting_ids)

    def run(self, *, frozen: bool, final: bool, history: History | None = None) -> Run:
        """Run the experiment once, or on from its `history`; the devices stay unless `final`.

        A run that diverged returns like one that is complete: `finished` tells. Raises LobbyError,
        NoProgressError, TransportError.
        """
        members = self._fleet.numbered()
        run = self._run = open_run(
            self._experiment, frozen=frozen,
            devices=[(m.index or 0, m.device_id) for m in members], outbox=self,
            notify=self._notify, history=history,
        )  # fmt: skip
        self._notify({"event": "run", "frozen": frozen, "rounds_closed": run.rounds_closed})
        reason = "interrupted"
        try:
            self._fleet.new_run()
            for member in members:
                self._welcome(member)
            if not run.complete:  # otherwise only its end is missing, and devices may be gone
                self._wait_ready()
            run.start([m.index or 0 for m in self._fleet.numbered() if m.ready])
            while run.finished is None:
                worked = run.work()
                self._turn(0.0 if worked else run.idle_s(_IDLE_S))
            reason = run.finished.outcome.value
            if run.finished.outcome is Outcome.STALLED:
                raise NoProgressError(
                    f"{run.finished.detail}; restart them, or set round.deadline_s"
                )
        finally:
            self._end(run, reason, final=final or reason != Outcome.COMPLETE.value)
        return run

    def _wait_ready(self) -> None:
        deadline_s = time.monotonic() + self._experiment.config.round.lobby_s
        while True:
            ready = [m.device_id for m in self._fleet.numbered() if m.ready]
            if len(ready) >= self._experiment.config.devices.count:
                return
            self._turn(_POLL_S)
            self._check_lobby(deadline_s, ready)

    def _check_lobby(self, deadline_s: float, here: list[str]) -> None:
        count = self._experiment.config.devices.count
        if time.monotonic() > deadline_s:
            raise LobbyError(
                f"{len(here)} of {count} devices were ready after "
                f"{self._experiment.config.round.lobby_s:.0f} s ({', '.join(here) or 'none'}); "
                "start the others, or lower devices.count"
            )

    def _end(self, run: Run, reason: str, *, final: bool) -> None:
        """Tell the devices, collect their last reports, close the files."""
        run.stop()
        self.broadcast(End(run.header.run, final, reason))
        self._ending = True
        self._final_reports.clear()
        deadline_s = time.monotonic() + LAST_REPORTS_S
        try:
            while self._reports_missing() and time.monotonic() < deadline_s:
                self._turn(_POLL_S)
        except TransportError as error:
            self._notify({"event": "broker-lost", "reason": str(error)})
        finally:
            self._run, self._ending = None, False
            run.close(reason)

    def _reports_missing(self) -> bool:
        present = {m.index for m in self._fleet.numbered() if m.ready}
        return self._offline_since_s is None and not present <= self._final_reports

    # -- the outbox of a run -----------------------------------------------------------------

    def broadcast(self, message: DownMessage) -> None:
        """To every device."""
        self._publish(self._topics.broadcast, message)

    def send(self, device: int, message: DownMessage) -> None:
        """To one device, by index."""
        self._down(self._fleet.numbered()[device].device_id, message)

    def send_frame(self, device: int, frame: Frame) -> None:
        """A tensor to one device, by index, for the session that it has now."""
        member = self._fleet.numbered()[device]
        if member.epoch < 0:
            return
        compressed = self._experiment.config.wire.compression == "zstd"
        payload = encode_frame(frame._replace(epoch=member.epoch), compressed=compressed)
        with contextlib.suppress(QueueFullError):
            self._link.publish(self._topics.down(member.device_id), payload)

    def offer_blob(self, data: bytes) -> str:
        """Make a blob fetchable; returns its digest."""
        return self._blobs.offer(data)

    def _down(self, device_id: str, message: DownMessage) -> None:
        self._publish(self._topics.down(device_id), message)

    def _publish(self, topic: str, message: DownMessage) -> None:
        # What does not fit into the queue is lost, as on any broker: devices ask again.
        with contextlib.suppress(QueueFullError):
            self._link.publish(topic, encode(message))

    # -- events ------------------------------------------------------------------------------

    def _turn(self, timeout_s: float) -> None:
        """Take the events that are here, waiting at most `timeout_s` for the first; keep time."""
        event = self._link.next_event(min(timeout_s, _POLL_S) if self._blobs.asked else timeout_s)
        taken = 0
        while event is not None:
            self._take(event)
            taken += 1
            # A flood must leave time for the work in between.
            event = self._link.next_event(0.0) if taken < _EVENTS_A_TURN else None
        self._feed()
        if self._run is not None:
            self._run.tick()
        offline = self._offline_since_s
        if offline is not None and time.monotonic() - offline > OFFLINE_S:
            raise TransportError(f"broker lost for {OFFLINE_S:.0f} s; the journal holds the run")

    def _take(self, event: LinkEvent) -> None:
        match event:
            case Received():
                self._receive(event)
            case Connected():
                self._connected()
            case Disconnected():
                self._lost(event)

    def _connected(self) -> None:
        """(Re)connected: last wills may have been lost, so only who answers is here."""
        self._offline_since_s = None
        if self._run is not None:
            for member in self._fleet.numbered():
                self._run.left(member.index or 0)
        self.broadcast(Hello())

    def _lost(self, event: Disconnected) -> None:
        if event.fatal:
            raise TransportError(
                f"broker closed the connection of fleet {self._topics.fleet!r}: {event.reason}"
            )
        self._notify({"event": "broker-lost", "reason": event.reason})
        self._offline_since_s = self._offline_since_s or time.monotonic()

    def _receive(self, event: Received) -> None:
        uplink = self._topics.parse_uplink(event.topic)
        if uplink is None:
            return
        member, run = self._fleet.member(uplink.device_id), self._run
        try:
            if not uplink.is_frame:
                self._control(uplink.device_id, member, decode_up(event.payload))
            elif run is not None and member is not None and member.index is not None:
                frame = decode_frame(event.payload, run.terms.compressed_max_bytes)
                self._frame(run, member, member.index, frame)
        except ProtocolError as error:
            if run is not None:
                run.ledger.useless("refused")
            self._say_refused("refused-message", uplink.device_id, str(error))

    def _frame(self, run: Run, member: Member, index: int, frame: Frame) -> None:
        if frame.run != run.header.run or frame.epoch != member.epoch:
            return
        self._judged(run, member, lambda: run.frame(index, frame))

    def _derivatives(self, member: Member, answer: Derivatives) -> None:
        run, index = self._run, member.index
        if run is not None and index is not None and answer.run == run.header.run:
            self._judged(run, member, lambda: run.derivatives(index, answer))

    def _judged(self, run: Run, member: Member, take: Callable[[], None]) -> None:
        """Take what a device computed; tell it when that does not fit the run."""
        try:
            take()
        except FrameFaultError as error:
            run.ledger.useless("refused")
            self._say_refused("refused-device", member.device_id, str(error))
            self._down(member.device_id, Refused(member.epoch, str(error)))

    def _say_refused(self, event: str, device_id: str, why: str) -> None:
        second, said = self._refusals_said
        now_s = time.monotonic()
        if now_s - second >= 1.0:
            second, said = now_s, 0
        if said < _REFUSALS_SAID:
            self._notify({"event": event, "device": device_id, "why": why})
        self._refusals_said = (second, said + 1)

    def _control(self, device_id: str, member: Member | None, message: UpMessage) -> None:
        match message:
            case Join():
                self._join(device_id, message)
            case Fetch() if member is not None:
                self._blobs.ask(device_id, message)
            case Leave():
                self._leave(device_id, message)
            case Ready() if member is not None and message.epoch == member.epoch:
                self._ready(member, message)
            case Ready():  # it has not heard that the server was started anew
                self._down(device_id, Hello())
            case Derivatives() if member is not None and message.epoch == member.epoch:
                self._derivatives(member, message)
            case Report() if member is not None and message.epoch == member.epoch:
                self._report(member, message)
            case _:
                pass

    def _join(self, device_id: str, join: Join) -> None:
        if join.protocol != PROTOCOL_VERSION:
            why = f"it speaks protocol {join.protocol}, not {PROTOCOL_VERSION}; update musplit"
            self._down(device_id, Refused(join.epoch, why))
            return
        known = self._fleet.member(device_id)
        if known is None or known.epoch != join.epoch:
            self._notify(
                {
                    "event": "joined",
                    "device": device_id,
                    "samples": join.samples,
                    "version": join.version,
                }
            )
        numbered = self._fleet.join(device_id, join)
        if self._fleet.member(device_id) is None:
            why = f"the fleet is full ({len(self._fleet.numbered())} devices)"
            self._down(device_id, Refused(join.epoch, why))
            return
        if self._run is not None:
            for newcomer in numbered:
                self._run.ledger.joined(newcomer.index or 0, newcomer.device_id)
            member = self._fleet.member(device_id)
            if member is not None:
                self._welcome(member)

    def _welcome(self, member: Member) -> None:
        run = self._run
        if run is None or member.index is None or member.join is None:
            return
        size_bytes = len(self._experiment.client.manifest_data)
        welcome = run.welcome(member.index, member.epoch, size_bytes)
        signed = replace(welcome, bundle_signature=self._bundle_signature)
        self._down(member.device_id, signed)

    def _feed(self) -> None:
        """Serve the blobs that devices asked for, as fast as the broker takes them."""
        while self._blobs.asked and self._link.backlog < _BACKLOG:
            device_id, chunks = self._blobs.answer()
            for chunk in chunks:
                self._down(device_id, chunk)

    def _leave(self, device_id: str, leave: Leave) -> None:
        member = self._fleet.leave(device_id, leave.epoch)
        if member is None:
            return
        self._notify({"event": "left", "device": device_id, "reason": leave.reason})
        if self._run is not None and member.index is not None:
            self._run.left(member.index)

    def _ready(self, member: Member, ready: Ready) -> None:
        run = self._run
        if run is None or member.index is None:
            return
        if ready.run != run.header.run:  # it missed the end of that run
            self._welcome(member)
            return
        member.ready = True
        run.ready(member.index, ready.next_round)

    def _report(self, member: Member, report: Report) -> None:
        run = self._run
        if run is None or member.index is None or report.run != run.header.run:
            return
        if report.round > run.rounds_closed:
            return
        run.ledger.reported(member.index, member.device_id, report)
        if self._ending and report.round >= run.rounds_closed:
            self._final_reports.add(member.index)
