"""Metrics of one run on disk, twice: CSV for people, JSON lines for programs.

They are not the truth of a run and are not forced onto the disk: what a crash took of them is
empty in the rows of a resumed run.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from server_node.energy import Energies
from server_node.journal import RoundClosed
from wire_protocol.energy import MeasuredByPhase, ModelledByPhase
from wire_protocol.messages import Report

REPORTS_FILE: Final = "devices.jsonl"


@dataclass
class RoundMetrics:
    """One round as the server saw it; None where nothing was measured."""

    round: int
    accuracy: float | None
    loss: float | None
    contributions: int
    dropped: int | None  # this and the following: None also when the server was killed before
    late_frames: int | None
    duplicate_frames: int | None
    refused_frames: int | None
    tau: int | float  # server steps of a contribution, in the mean
    server_steps: int | None
    seconds: float | None
    server_busy_s: float | None
    server_busy_while_waiting_s: float | None
    bytes_up: int | None  # cumulative over the run, as reported so far
    bytes_down: int | None
    measured_energy_j: float | None  # likewise; None: docs/energy.md, and summary.json says why
    modelled_energy_j: float | None
    pooled_loss: float | None
    guard_rejected: int | None
    guard_clipped: int | None
    fraction_server: float | None
    fraction_client: float | None
    factor_server: float | None
    factor_client: float | None
    simulated_s: float | None = None  # by the virtual clock since the run began; None: a real run


class DeviceReport(NamedTuple):
    """What a round cost a device, by its own account."""

    device_id: str
    device: int
    report: Report


# Of devices.csv, from a report's `energy`, which devices.jsonl has as it is.
ENERGY_COLUMNS = (
    *(f.name for f in msgspec.structs.fields(MeasuredByPhase) if f.name != "origin"),
    *(f.name for f in msgspec.structs.fields(ModelledByPhase)
      if f.name.endswith(("_j", "model", "source"))),
    "meter", "boundary", "reason",
)  # fmt: skip
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


class PastMetrics(NamedTuple):
    """What was recorded of a run before it was stopped."""

    rounds: list[RoundMetrics]  # 0, 1, .. as far as rows were found, gaps filled
    reports: list[DeviceReport]

    def total(self, field: str) -> Any:
        """Sum of a field over the rounds; what was not measured counts as 0."""
        return sum(getattr(row, field) or 0 for row in self.rounds)

    def traffic(self) -> Traffic:
        """The counters that the devices had reported."""
        traffic = Traffic()
        for report in self.reports:
            traffic.add(report.device, report.report)
        return traffic

    def energies(self) -> Energies:
        """The energies that the devices had reported."""
        energies = Energies()
        for report in self.reports:
            energies.add(report.device, report.device_id, report.report)
        return energies


NOTHING_RECORDED = PastMetrics([], [])


def read_metrics(folder: Path, run: int, rounds: list[RoundClosed], tau: int) -> PastMetrics:
    """The rows of FOLDER that belong to these closed rounds; what is damaged is left out."""
    found = {row.round: row for row in read_rounds(folder)}
    last = max((number for number in found if number < len(rounds)), default=-1)
    rows = [found.get(number) or unmeasured(rounds[number], tau) for number in range(last + 1)]
    reports = [
        row
        for row in read_reports(folder)
        if row.report.run == run and row.report.round <= len(rounds)
    ]
    return PastMetrics(rows, reports)


def unmeasured(closed: RoundClosed, tau: int) -> RoundMetrics:
    """What the journal alone tells of a round."""
    nothing = dict.fromkeys(field.name for field in fields(RoundMetrics))
    steps = [len(s.server_scalars) // (4 * s.directions_server) for s in closed.shares]
    known = {
        "round": closed.round, "contributions": len(closed.shares), "tau": mean_tau(steps, tau)
    }  # fmt: skip
    return RoundMetrics(**{**nothing, **known})  # type: ignore[arg-type]  # the rest may be None


def mean_tau(steps: list[int], tau: int) -> int | float:
    """Mean of the contributions' `steps`; `tau`, the floor, when none is known.

    Pooled steps are all the lowest device's: those that have none do not count.
    """
    known = [count for count in steps if count]
    if not known:
        return tau
    mean = sum(known) / len(known)
    return int(mean) if mean.is_integer() else round(mean, 2)


def read_rounds(folder: Path) -> Iterator[RoundMetrics]:
    """The rows of FOLDER/rounds.jsonl; what is damaged is left out."""
    for line in _read_rows(folder / "rounds.jsonl"):
        with contextlib.suppress(msgspec.ValidationError):
            yield msgspec.convert(line, RoundMetrics)


def read_reports(folder: Path) -> Iterator[DeviceReport]:
    """The rows of FOLDER/devices.jsonl; what is damaged is left out."""
    for line in _read_rows(folder / REPORTS_FILE):
        with contextlib.suppress(msgspec.ValidationError):
            name = msgspec.convert(line.pop("device_id", None), str)
            index = msgspec.convert(line.pop("device", None), int)
            yield DeviceReport(name, index, msgspec.convert(line, Report))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def _row(report: DeviceReport) -> dict[str, Any]:
    fields = msgspec.to_builtins(report.report)
    del fields["type"]
    return {"device_id": report.device_id, "device": report.device, **fields}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row without tables in it: a field of `energy` is a cell of its own."""
    energy = row.get("energy")
    if not isinstance(energy, dict):
        return row
    cells = {name: value for name, value in energy.items() if name in ENERGY_COLUMNS}
    origin = energy.get("origin", energy)
    cells |= {"energy": energy["type"], "meter": origin.get("meter"),
              "boundary": origin.get("boundary")}  # fmt: skip
    return {**row, **cells}


class Table:
    """A CSV file and a JSON-lines file with the same rows, those of `kept` first."""

    def __init__(
        self, folder: Path, name: str, columns: list[str], kept: Iterable[dict[str, Any]]
    ) -> None:
        # Under another name at first: being killed in here loses no row.
        paths = [folder / f"{name}{ending}" for ending in (".csv", ".jsonl")]
        files = [
            path.with_name(path.name + ".new").open("w", newline="", encoding="utf-8")
            for path in paths
        ]
        self._csv_file, self._json_file = files
        self._csv = csv.DictWriter(self._csv_file, columns)
        self._csv.writeheader()
        for row in kept:
            self._write(row)
        self._flush()
        for path in paths:
            path.with_name(path.name + ".new").replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and flush: a killed run keeps what it measured."""
        self._write(row)
        self._flush()

    def _write(self, row: dict[str, Any]) -> None:
        self._csv.writerow(_flat(row))
        self._json_file.write(json.dumps(row) + "\n")

    def _flush(self) -> None:
        self._csv_file.flush()
        self._json_file.flush()

    def close(self) -> None:
        """Close both files."""
        self._csv_file.close()
        self._json_file.close()


class Recorder:
    """rounds.csv/.jsonl and devices.csv/.jsonl of one run folder; `past` is kept in them."""

    def __init__(self, folder: Path, past: PastMetrics = NOTHING_RECORDED) -> None:
        report_columns = [f.name for f in msgspec.structs.fields(Report)]
        self._rounds = Table(
            folder, "rounds", [f.name for f in fields(RoundMetrics)], map(asdict, past.rounds)
        )
        self._devices = Table(
            folder, "devices", ["device_id", "device", *report_columns, *ENERGY_COLUMNS],
            map(_row, past.reports),
        )  # fmt: skip

    def round(self, metrics: RoundMetrics) -> dict[str, Any]:
        """Record a round; returns the row."""
        row = asdict(metrics)
        self._rounds.add(row)
        return row

    def device(self, report: DeviceReport) -> None:
        """Record what a round cost a device."""
        self._devices.add(_row(report))

    def close(self) -> None:
        """Close all files."""
        self._rounds.close()
        self._devices.close()
