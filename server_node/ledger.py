"""What a run leaves behind: journal, metrics, trace, checkpoint, and their counters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server_node.actions import CloseRound, Outcome, Step, Work
from server_node.checkpoint import ANCHOR_FILE, Checkpoint, save_checkpoint
from server_node.energy import spent
from server_node.frames_log import (
    FramesWriter,
    StoredFrame,
    StoredRound,
    StoredTurn,
    continue_frames,
)
from server_node.guards import Intervened
from server_node.journal import (
    JOURNAL_FILE,
    DeviceJoined,
    Digests,
    Ended,
    Guarded,
    Header,
    JournalWriter,
    Resumed,
    RoundClosed,
)
from server_node.pool import UsedFrame, UsedTurn
from server_node.recorder import (
    NOTHING_RECORDED,
    DeviceReport,
    PastMetrics,
    Recorder,
    RoundMetrics,
    mean_tau,
    read_metrics,
    unmeasured,
)
from server_node.resume import Past
from server_node.torch_half import Scores
from server_node.trace import ROUNDS, SERVER_PID, Trace
from wire_protocol.frames import Frame
from wire_protocol.manifest import sha256
from wire_protocol.messages import Report

TRACE_FILE = "trace.json"


class Ledger:
    """The open files of a run folder. Times are `time.monotonic`; the trace gets Unix time."""

    def __init__(
        self, folder: Path, journal: JournalWriter, past: PastMetrics, *, resume: bool,
        frames: FramesWriter | None = None, virtual: bool = False,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.traffic = past.traffic()
        self.energies = past.energies()
        self.server_steps: int = past.total("server_steps")
        self.busy_s: float = past.total("server_busy_s")
        self.busy_waiting_s: float = past.total("server_busy_while_waiting_s")
        self.past_s: float = past.total("seconds")
        self._journal = journal
        self._frames_file = frames  # first order
        self._recorder = Recorder(folder, past)
        self._recorded = len(past.rounds)
        # The trace tells of wall-clock times.
        self._trace = None if virtual else Trace(folder / TRACE_FILE, resume=resume)
        self._unix_offset_s = time.time() - time.monotonic()
        # Epoch and round of each device's last report.
        self._reported = {r.device: (r.report.epoch, r.report.round) for r in past.reports}
        self._frames = {"late": 0, "duplicate": 0, "refused": 0}
        # Steps and busy times at the last round's end.
        self._mark = (self.server_steps, self.busy_s, self.busy_waiting_s)

    @classmethod
    def begin(
        cls, folder: Path, header: Header, devices: list[tuple[int, str]], *, virtual: bool = False
    ) -> Ledger:
        """The ledger of a new run of these devices, given as (index, id).

        `virtual`: its times are a virtual clock's from 0 on, nobody waits for the disk.
        """
        joined = [DeviceJoined(index, device_id) for index, device_id in devices]
        journal = JournalWriter(folder / JOURNAL_FILE, header, *joined, durable=not virtual)
        first = header.server_order == "first"
        frames = FramesWriter(folder, durable=not virtual) if first else None
        return cls(
            folder, journal, NOTHING_RECORDED, resume=False, frames=frames, virtual=virtual
        )  # fmt: skip

    @classmethod
    def resume(cls, past: Past, tau: int, record: Resumed) -> Ledger:
        """The ledger of a run that goes on; `record` says on what."""
        metrics = read_metrics(past.folder, past.header.run, past.rounds, tau)
        journal = JournalWriter(past.folder / JOURNAL_FILE, None, size_bytes=past.size_bytes)
        journal.append(record)
        first = past.header.server_order == "first"
        frames = continue_frames(past.folder, len(past.rounds)) if first else None
        return cls(past.folder, journal, metrics, resume=True, frames=frames)

    def joined(self, index: int, device_id: str) -> None:
        """A device was given its index."""
        self._journal.append(DeviceJoined(index, device_id))

    def reported(self, index: int, device_id: str, report: Report) -> None:
        """A device told what a round cost it; only the first report of each round counts."""
        epoch, last = self._reported.get(index, (report.epoch, -1))
        if epoch == report.epoch and report.round <= last:
            return
        self._reported[index] = report.epoch, report.round
        self.traffic.add(index, report)
        before = self.energies.add(index, device_id, report)
        self._recorder.device(DeviceReport(device_id, index, report))
        if self._trace is not None:
            self._trace.device_round(index, device_id, report, spent(before, report.energy))

    def arrived(self, device: int, frame: Frame, at_s: float) -> None:
        """A frame that fits the run came in."""
        if self._trace is not None:
            self._trace.instant(
                f"{frame.kind.name.lower()} arrived", at_s + self._unix_offset_s,
                device=device, round=frame.round, first_k=frame.first_k,
            )  # fmt: skip

    def useless(self, kind: str) -> None:
        """A frame was late, a duplicate, or refused."""
        self._frames[kind] += 1

    def worked(
        self, pieces: Sequence[Work], number: int, begin_s: float, seconds: float, *, waiting: bool
    ) -> None:
        """Pieces of work of round `number` were done at once; `waiting`: frames were awaited."""
        self.busy_s += seconds
        self.busy_waiting_s += seconds if waiting else 0.0
        for work in pieces:
            step = isinstance(work, Step)
            self.server_steps += step
            if self._trace is not None:
                self._trace.work(
                    "step" if step else "measure", begin_s + self._unix_offset_s, seconds,
                    round=number, **work._asdict(),
                )  # fmt: skip

    def used(self, number: int, turns: list[UsedTurn]) -> None:
        """First order: what round `number` was stepped on, on the disk before its record."""
        if self._frames_file is None or not turns:
            return
        stored = {(f.device, f.round): f for turn in turns for f in turn.frames}
        self._frames_file.append(
            StoredRound(
                number, [StoredTurn(t.device, [(f.device, f.round) for f in t.frames])
                         for t in turns],
            ),
            [_stored(frame) for frame in stored.values()],
        )  # fmt: skip

    def limit_frames(self, limit_bytes: int, anchor: Checkpoint) -> None:
        """Begin frames.bin anew behind `anchor`, whose digests are journaled, when it is large."""
        if self._frames_file is not None and self._frames_file.size_bytes > limit_bytes:
            save_checkpoint(self.folder, anchor, ANCHOR_FILE)
            self._frames_file.start_over()

    def committed(self, record: RoundClosed, guarded: Sequence[Guarded]) -> None:
        """A round was closed: on the disk before anybody is told."""
        self._journal.append(*guarded, record)

    def verified(self, now: Checkpoint, *, keep: bool) -> None:
        """Journal the digests; `keep`: replace the checkpoint by this one."""
        optimiser = sha256(now.optimiser) if self._frames_file is not None else ""
        digests = Digests(now.next_round, sha256(now.client), sha256(now.server), optimiser)
        self._journal.append(digests)
        if keep:
            save_checkpoint(self.folder, now)

    def catch_up(self, rounds: list[RoundClosed], tau: int, last: Scores | None) -> None:
        """Record the closed rounds that have no row; `last` are the scores after the last one."""
        for closed in rounds[self._recorded :]:
            row = unmeasured(closed, tau)
            if last is not None and closed is rounds[-1]:
                traffic = self.traffic.totals()
                row.accuracy, row.loss = last.accuracy, last.loss
                row.bytes_up, row.bytes_down = traffic["bytes_up"], traffic["bytes_down"]
                row.measured_energy_j, row.modelled_energy_j = self.energies.so_far()
            self._recorder.round(row)
        self._recorded = len(rounds)

    def measured(
        self, closed: CloseRound, closed_s: float, tau: int, scores: Scores | None,
        guarded: Intervened,
    ) -> dict[str, Any]:  # fmt: skip
        """Record the metrics of a round; returns the row."""
        steps, busy_s, waiting_s = self._mark
        traffic, energy = self.traffic.totals(), self.energies.so_far()
        metrics = RoundMetrics(
            round=closed.round, accuracy=scores.accuracy if scores else None,
            loss=scores.loss if scores else None, contributions=len(closed.contributions),
            dropped=len(closed.dropped), late_frames=self._frames["late"],
            duplicate_frames=self._frames["duplicate"], refused_frames=self._frames["refused"],
            tau=mean_tau([len(c.server_scalars) for c in closed.contributions], tau),
            server_steps=self.server_steps - steps, seconds=closed_s - closed.opened_s,
            server_busy_s=self.busy_s - busy_s,
            server_busy_while_waiting_s=self.busy_waiting_s - waiting_s,
            bytes_up=traffic["bytes_up"], bytes_down=traffic["bytes_down"],
            measured_energy_j=energy.measured, modelled_energy_j=energy.modelled,
            pooled_loss=guarded.pooled_loss, guard_rejected=guarded.rejected,
            guard_clipped=guarded.clipped, fraction_server=guarded.fraction_server,
            fraction_client=guarded.fraction_client, factor_server=guarded.factor_server,
            factor_client=guarded.factor_client,
            simulated_s=closed_s if self._trace is None else None,
        )  # fmt: skip
        self._mark = (self.server_steps, self.busy_s, self.busy_waiting_s)
        self._frames = dict.fromkeys(self._frames, 0)
        if self._trace is not None:
            self._trace.span(
                SERVER_PID, ROUNDS, f"round {closed.round}", closed.opened_s + self._unix_offset_s,
                closed_s - closed.opened_s,
                dropped={str(device): why for device, why in closed.dropped.items()},
            )  # fmt: skip
        return self._recorder.round(metrics)

    def close(self, reason: str, now: Checkpoint | None) -> None:
        """The run is over; weights that diverged do not replace those of the checkpoint.

        Without weights the journal ends where it is: whether the last commit is in it is unknown.
        """
        if now is not None:
            self.verified(now, keep=reason != Outcome.DIVERGED.value)
            self._journal.append(Ended(reason))
        self._journal.close()
        if self._frames_file is not None:
            self._frames_file.close()
        self._recorder.close()
        if self._trace is not None:
            self._trace.close()


def _stored(frame: UsedFrame) -> StoredFrame:
    h, labels = frame.batch.h.cpu().numpy(), frame.batch.labels.cpu().numpy()
    return StoredFrame(
        frame.device, frame.round, list(h.shape), h.astype("<f4").tobytes(),
        labels.astype("<u4").tobytes(),
    )  # fmt: skip
