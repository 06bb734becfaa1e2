"""Metrics of one run on disk, twice: CSV for people, JSON lines for programs."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
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


_COUNTERS = ("bytes_up", "bytes_down", "bundle_bytes_up", "bundle_bytes_down")


class Traffic:
    """Bytes on the devices' TCP streams in one run; the bundle's transfer is kept apart."""

    def __init__(self) -> None:
        # A restarted device counts from zero again, in a session of its own.
        self._sessions: dict[tuple[int, int], Report] = {}

    def add(self, index: int, report: Report) -> None:
        """Take over the cumulative counters of a device's session."""
        self._sessions[index, report.epoch] = report

    def totals(self) -> dict[str, int]:
        """Sums over devices: bytes_up and bytes_down without the bundle, and the bundle's."""
        sums = {name: sum(getattr(r, name) for r in self._sessions.values()) for name in _COUNTERS}
        sums["bytes_up"] -= sums["bundle_bytes_up"]
        sums["bytes_down"] -= sums["bundle_bytes_down"]
        return sums


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
