"""Delays fitted on a recorded run: what its devices and its server took, for other settings.

A device's round is fixed_s + forwards * forward_s. forward_s comes from the devices' reports.
fixed_s is what remains of the time between the opening of a round and the arrival of the
activation, both by the server's clock, so that no two clocks are compared: links, replay, waiting
and added delays are in it. Medians over rounds; the first, in which everything is loaded, counts
for nothing. Of an emulation in slow motion they are the boards' times: slow motion is taken out.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from emulation.delays import DeviceTiming, Timings
from emulation.errors import FitError
from export.perturb import NONE
from server_node.config import load_config
from server_node.files import CONFIG_FILE
from server_node.ledger import TRACE_FILE
from server_node.recorder import REPORTS_FILE, read_reports
from server_node.summary_file import SUMMARY_FILE
from server_node.trace import read_events

_MICROSECOND_S: Final = 1e-6


class _Emulated(msgspec.Struct):
    device: int
    slow_motion: Annotated[float, msgspec.Meta(ge=1)]


class _Summary(msgspec.Struct):
    """What matters here of a summary.json."""

    emulated: list[_Emulated]


@dataclass
class _Server:
    """What the trace says; keyed by device and round, in seconds."""

    opened_s: dict[int, float] = field(default_factory=dict)
    arrived_s: dict[tuple[int, int], float] = field(default_factory=dict)
    steps_s: list[float] = field(default_factory=list)
    measures_s: defaultdict[tuple[int, int], float] = field(
        default_factory=lambda: defaultdict(float)
    )

    def take(self, event: dict[str, Any]) -> None:
        """Take note of one event. Raises KeyError, TypeError, ValueError."""
        match str(event.get("name")).split():
            case ["step"]:
                self.steps_s.append(_seconds(event, "dur"))
            case ["measure"]:
                self.measures_s[_place(event)] += _seconds(event, "dur")
            case ["activation", "arrived"]:
                self.arrived_s.setdefault(_place(event), _seconds(event, "ts"))
            case ["round", number]:
                self.opened_s[int(number)] = _seconds(event, "ts")

    def to_activation_s(self) -> dict[int, float]:
        """Of each device, the median time from a round's opening to its activation."""
        spans: defaultdict[int, list[float]] = defaultdict(list)
        for (device, number), at_s in self.arrived_s.items():
            if number > 0 and number in self.opened_s:
                spans[device].append(at_s - self.opened_s[number])
        return {device: statistics.median(values) for device, values in spans.items()}


def fit_files(run: Path) -> list[Path]:
    """The files of a run that a fit reads."""
    return [run / name for name in (CONFIG_FILE, TRACE_FILE, REPORTS_FILE, SUMMARY_FILE)]


def fit_timings(run: Path) -> Timings:
    """The times of the run in folder RUN, written by `musplit emulate` or `serve`. Raises FitError.

    Devices that never computed get the slowest one's times.
    """
    config = load_config(run / CONFIG_FILE, [])
    method = config.method
    trains = method.eta_c and config.model.perturb != [NONE]
    directions = method.directions_client if trains else 0
    server = _Server()
    try:
        for event in read_events(run / TRACE_FILE):
            server.take(event)
    except (KeyError, TypeError, ValueError) as error:
        raise FitError(f"{run / TRACE_FILE}: not a trace of this program ({error!r})") from error
    forward_s = _forwards_s(run, 2 * directions + 1)
    slow = _slow_motion(run) if config.emulation.fleet else {}
    known = {
        device: DeviceTiming(
            max(0.0, seconds - forward_s[device]) / slow.get(device, 1.0),
            forward_s[device] / slow.get(device, 1.0),
        )
        for device, seconds in server.to_activation_s().items()
        if device in forward_s
    }
    if not known or not server.steps_s:
        raise FitError(
            f"{run}: holds no times of devices and server (devices.jsonl, {TRACE_FILE}) beyond the "
            "first round; give the folder of a longer run of musplit emulate or serve"
        )
    slowest = max(known.values())
    measures_s = server.measures_s.values()
    return Timings(
        [known.get(device, slowest) for device in range(max(known) + 1)],
        statistics.median(server.steps_s),
        statistics.median(measures_s) / directions if measures_s else 0.0,
    )


def _place(event: dict[str, Any]) -> tuple[int, int]:
    """Device and round of an event."""
    device, number = event["args"]["device"], event["args"]["round"]
    if type(device) is not int or type(number) is not int or device < 0:
        raise ValueError(f"device {device!r}, round {number!r}")
    return device, number


def _seconds(event: dict[str, Any], name: str) -> float:
    seconds = float(event[name]) * _MICROSECOND_S
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} {event[name]!r}")
    return seconds


def _slow_motion(run: Path) -> dict[int, float]:
    """Of each device of an emulated fleet: for how many seconds one of its board's stands."""
    path = run / SUMMARY_FILE
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=_Summary).emulated
    except (OSError, ValueError) as error:
        raise FitError(
            f"{path}: cannot be read, and holds the slow motion of the emulated boards; give a "
            "run that has ended"
        ) from error
    return {row.device: row.slow_motion for row in rows}


def _forwards_s(run: Path, forwards: int) -> dict[int, float]:
    """Of each device, the median seconds of a forward, its perturbation and encoding included."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    for row in read_reports(run):
        report = row.report
        if report.started_unix_s and report.round > 0:
            spent_s = report.perturb_s + report.forward_s + report.encode_s
            found[row.device].append(spent_s / forwards)
    return {device: statistics.median(values) for device, values in found.items()}
