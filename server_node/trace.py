"""Who did what when, as a Chrome trace (the "JSON Array Format" of the Trace Event Format).

Opens in Perfetto or chrome://tracing. Times are wall-clock microseconds; devices report their own.
The file is a valid trace at any moment: viewers accept an array without its closing bracket. It
stops growing after MAX_EVENTS.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from wire_protocol.messages import Report

# About 25 MB, which viewers still open with ease.
MAX_EVENTS: Final = 200_000
SERVER_PID: Final = 1
DEVICES_PID: Final = 2
COMPUTE: Final = 1
NETWORK: Final = 2
ROUNDS: Final = 3
_SLOTS: Final = 10  # slot 1 and up of a batch; slot 0 is COMPUTE


class Trace:
    """Appends events, to those of a run before it was stopped; `close` completes the array."""

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        kept = _whole_events(path) if resume else []
        self._file = path.open("w", encoding="utf-8", buffering=1)  # flushed with every event
        self._left = max(0, MAX_EVENTS - len(kept))
        self._file.write("[" + ",".join(f"\n{line}" for line in kept))
        self._separator = ",\n" if kept else "\n"
        self._named: set[int] = set()
        self._slots_named: set[int] = set()
        self._name("process_name", SERVER_PID, 0, "server")
        self._name("thread_name", SERVER_PID, COMPUTE, "compute")
        self._name("thread_name", SERVER_PID, NETWORK, "network")
        self._name("thread_name", SERVER_PID, ROUNDS, "rounds")
        self._name("process_name", DEVICES_PID, 0, "devices")

    def span(
        self, pid: int, tid: int, name: str, start_s: float, seconds: float, **args: object
    ) -> None:
        """A piece of work: start as Unix time."""
        self._event(
            {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": round(start_s * 1e6, 1),
             "dur": round(seconds * 1e6, 1), "args": args}
        )  # fmt: skip

    def work(
        self, name: str, start_s: float, seconds: float, *, slot: int = 0, **args: object
    ) -> None:
        """The server's work: the steps of a batch stand beside each other, a thread per slot."""
        tid = _SLOTS + slot if slot else COMPUTE
        if slot and slot not in self._slots_named:
            self._slots_named.add(slot)
            self._name("thread_name", SERVER_PID, tid, f"compute, slot {slot}")
        self.span(SERVER_PID, tid, name, start_s, seconds, **args)

    def instant(self, name: str, at_s: float, **args: object) -> None:
        """Something that arrived at, or left, the server."""
        self._event(
            {"ph": "i", "s": "t", "pid": SERVER_PID, "tid": NETWORK, "name": name,
             "ts": round(at_s * 1e6, 1), "args": args}
        )  # fmt: skip

    def device_round(
        self, index: int, device_id: str, report: Report, spent: dict[str, Any]
    ) -> None:
        """A device's round by phase. The phases alternate in truth; here they are summed.

        `spent` are the joules since the report before, and the mean watts, if they are known.
        """
        if index not in self._named:
            self._named.add(index)
            self._name("thread_name", DEVICES_PID, index + 1, device_id)
        at_s = report.started_unix_s
        if not at_s:
            return
        for phase in ("perturb_s", "forward_s", "encode_s", "wait_s", "replay_s"):
            seconds = getattr(report, phase)
            name = phase.removesuffix("_s")
            joules = {key: value for key, value in spent.items() if key.startswith(f"{name}_")}
            self.span(DEVICES_PID, index + 1, name, at_s, seconds, round=report.round, **joules)
            at_s += seconds
        watts = {key: value for key, value in spent.items() if key.endswith("_w")}
        if watts:
            self._event(
                {"ph": "C", "pid": DEVICES_PID, "name": f"power {device_id}",
                 "ts": round(report.started_unix_s * 1e6, 1), "args": watts}
            )  # fmt: skip

    def close(self) -> None:
        """Complete the array."""
        self._file.write("\n]\n")
        self._file.close()

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self._event({"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}})

    def _event(self, event: dict[str, Any]) -> None:
        if not self._left:
            return
        self._left -= 1
        self._file.write(self._separator + json.dumps(event, separators=(",", ":")))
        self._separator = ",\n"


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace, also of one that was cut; nothing when there is no file."""
    for line in _whole_events(path):
        event = json.loads(line)
        if isinstance(event, dict):
            yield event


def _whole_events(path: Path) -> list[str]:
    """The events of a trace, one a line as they were written, without a torn end."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").removeprefix("[").split("\n")
    events = [line.removesuffix(",") for line in lines if line.startswith("{")]
    while events and not _is_json(events[-1]):
        events.pop()
    return events


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
