"""Metrics of one run on disk, twice: CSV for people, JSON lines for programs."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import msgspec

from wire_protocol.messages import Report


@dataclass
class RoundMetrics:
    """One round as the server saw it; None where nothing was measured."""

    round: int
    accuracy: float | None
    loss: float | None
    contributions: int
    dropped: int
    late_frames: int
    duplicate_frames: int
    refused_frames: int
    tau: int
    server_steps: int
    seconds: float
    server_busy_s: float
    server_busy_while_waiting_s: float
    bytes_up: int  # cumulative over the run, as reported so far
    bytes_down: int


@dataclass
class DeviceTotals:
    """Byte counts of one device's stream in one run, from its cumulative reports."""

    base: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        """Bytes of one counter within the run."""
        return self.last.get(name, 0) - self.base.get(name, 0)


_COUNTERS = ("bytes_up", "bytes_down", "bundle_bytes_up", "bundle_bytes_down")


class Traffic:
    """Bytes on the devices' TCP streams, per run; the bundle's transfer is kept apart.

    A report of a new session starts from zero again: what the old one counted is carried on.
    """

    def __init__(self) -> None:
        self._devices: dict[int, DeviceTotals] = {}
        self._sessions: dict[int, tuple[int, dict[str, int]]] = {}  # epoch, counts before it

    def add(self, index: int, report: Report) -> None:
        """Take over a device's cumulative counters."""
        totals = self._devices.setdefault(index, DeviceTotals())
        epoch, carried = self._sessions.get(index, (report.epoch, {}))
        if epoch != report.epoch:
            carried = dict(totals.last)
        self._sessions[index] = (report.epoch, carried)
        totals.last = {name: getattr(report, name) + carried.get(name, 0) for name in _COUNTERS}

    def start_run(self) -> None:
        """What was counted so far belongs to the runs before."""
        for totals in self._devices.values():
            totals.base = dict(totals.last)

    def totals(self) -> dict[str, int]:
        """Sums over devices: bytes_up and bytes_down without the bundle, and the bundle's."""
        sums = {name: sum(t.of(name) for t in self._devices.values()) for name in _COUNTERS}
        return {
            "bytes_up": sums["bytes_up"] - sums["bundle_bytes_up"],
            "bytes_down": sums["bytes_down"] - sums["bundle_bytes_down"],
            "bundle_bytes_up": sums["bundle_bytes_up"],
            "bundle_bytes_down": sums["bundle_bytes_down"],
        }


class Table:
    """A CSV file and a JSON-lines file with the same rows."""

    def __init__(self, folder: Path, name: str, columns: list[str]) -> None:
        self._csv_file: IO[str] = (folder / f"{name}.csv").open("w", newline="", encoding="utf-8")
        self._json_file: IO[str] = (folder / f"{name}.jsonl").open("w", encoding="utf-8")
        self._csv = csv.DictWriter(self._csv_file, columns)
        self._csv.writeheader()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and flush: a killed run keeps what it measured."""
        self._csv.writerow(row)
        self._json_file.write(json.dumps(row) + "\n")
        self._csv_file.flush()
        self._json_file.flush()

    def close(self) -> None:
        """Close both files."""
        self._csv_file.close()
        self._json_file.close()


class Recorder:
    """rounds.csv/.jsonl and devices.csv/.jsonl of one run folder."""

    def __init__(self, folder: Path) -> None:
        report_columns = [f.name for f in msgspec.structs.fields(Report)]
        self._rounds = Table(folder, "rounds", [f.name for f in fields(RoundMetrics)])
        self._devices = Table(folder, "devices", ["device_id", "device", *report_columns])

    def round(self, metrics: RoundMetrics) -> dict[str, Any]:
        """Record a round; returns the row."""
        row = asdict(metrics)
        self._rounds.add(row)
        return row

    def device(self, device_id: str, index: int, report: Report) -> None:
        """Record what a round cost a device."""
        row = {"device_id": device_id, "device": index, **msgspec.structs.asdict(report)}
        self._devices.add(row)

    def close(self) -> None:
        """Close all files."""
        self._rounds.close()
        self._devices.close()
