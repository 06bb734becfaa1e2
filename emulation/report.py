"""What a user sees of a run: a progress bar, a table at the end, and checks for CI."""

from __future__ import annotations

import operator
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from server_node.config import Config
from server_node.errors import ConfigError
from wire_protocol.messages import printable

_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_REQUIREMENT: Final = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


class Requirement(NamedTuple):
    """One --require: a field of the summary, a comparison, a value."""

    text: str
    field: str
    comparison: str
    value: float | str

    def judge(self, summary: dict[str, Any]) -> str:
        """Empty when it holds, otherwise why it does not."""
        if self.field not in summary:
            return f"the summary has no field {self.field!r}"
        have = summary[self.field]
        numeric = isinstance(have, int | float) and isinstance(self.value, float)
        if not numeric and (self.comparison not in ("==", "!=") or have is None):
            return f"{self.field} is {have!r}, which cannot be compared with {self.value!r}"
        left, right = (have, self.value) if numeric else (str(have), str(self.value))
        return "" if _COMPARE[self.comparison](left, right) else f"{self.field} is {have}"


def parse_requirement(text: str) -> Requirement:
    """Parse `accuracy>=0.9`. Raises ConfigError."""
    match = _REQUIREMENT.fullmatch(text)
    if match is None:
        raise ConfigError(f"--require {text!r}: write FIELD>=VALUE, e.g. accuracy>=0.9")
    field, comparison, value = match.groups()
    try:
        return Requirement(text, field, comparison, float(value))
    except ValueError:
        return Requirement(text, field, comparison, value)


def write_junit(path: Path, judged: list[tuple[Requirement, str]], seconds: float) -> None:
    """A JUnit report with one test case a requirement."""
    suite = ET.Element(
        "testsuite", name="musplit emulate", tests=str(len(judged)),
        failures=str(sum(bool(why) for _, why in judged)), time=f"{seconds:.3f}",
    )  # fmt: skip
    for requirement, why in judged:
        case = ET.SubElement(suite, "testcase", classname="musplit.emulate", name=requirement.text)
        if why:
            ET.SubElement(case, "failure", message=why)
    path.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


class ProgressView:
    """Shows a run's events: a bar on a terminal, a line an evaluation elsewhere."""

    def __init__(self, config: Config, stream: TextIO) -> None:
        self._config = config
        self._console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:>8}"), BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(compact=True), console=self._console,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._phase = "training"
        self._accuracy = self._loss = float("nan")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def notify(self, event: dict[str, Any]) -> None:
        """Show one event of the server or of the emulator."""
        match event["event"]:
            case "round":
                self._round(event)
            case "prepared":
                for note in event["data_notes"]:
                    self._say(f"data: {note}")
                for note in event["notes"]:
                    self._say(f"note: {note}")
                self._say(_text(event))
            case "run":
                self._phase_begins("control" if event["frozen"] else "training")
            case _:
                text = _text(event)
                if text:
                    self._say(text)

    def _phase_begins(self, phase: str) -> None:
        """A run began, or the server that resumed one."""
        if self._task is not None and phase == self._phase:
            return
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._phase = phase
        self._accuracy = self._loss = float("nan")
        self._task = self._progress.add_task(phase, total=self._config.run.rounds, info="")

    def _round(self, event: dict[str, Any]) -> None:
        if self._task is None:
            return
        if event["accuracy"] is not None:
            self._accuracy, self._loss = event["accuracy"], event["loss"]
        info = (
            f"accuracy {self._accuracy:.3f}  loss {self._loss:.3f}  "
            f"{(event['bytes_up'] + event['bytes_down']) / 1e6:.1f} MB  tau {event['tau']}"
        )
        if event["simulated_s"] is not None:
            info += f"  simulated {event['simulated_s']:.0f} s"
        self._progress.update(self._task, completed=event["round"] + 1, info=info)
        if not self._console.is_terminal and event["accuracy"] is not None:
            self._say(f"{self._phase} round {event['round'] + 1}/{self._config.run.rounds}: {info}")

    def _say(self, text: str) -> None:
        # Texts of devices are shown, never interpreted.
        self._progress.console.print(printable(text), soft_wrap=True, markup=False)


def _text(event: dict[str, Any]) -> str:
    """What to say of an event that is no progress; empty for one that says nothing."""
    text = ""
    match event["event"]:
        case "prepared":
            text = (
                f"exported: {event['parameters_client']} parameters on the device, "
                f"{event['parameters_server']} on the server"
            )
        case "packet-limit":
            text = f"packets of at most {event['bytes']} bytes: larger ones go in parts"
        case "waiting":
            text = f"waiting for {event['devices']} devices"
        case "resumed" | "slow-motion":
            text = event["text"]
        case "left" if event["reason"] != "finished":
            text = f"{event['device']} left: {event['reason']}"
        case "restarted":
            why = f": {event['why']}" if event["code"] > 0 else ""  # else it was killed
            text = f"{event['process']} ended (code {event['code']}{why}), started again"
        case "refused-message" | "refused-device":
            text = f"refused from {event['device']}: {event['why']}"
        case "broker-lost":
            text = f"broker lost: {event['reason']}"
        case "warning":
            text = f"warning: {event['text']}"
        case _:
            pass
    return text


def print_table(summary: dict[str, Any], folder: Path, stream: TextIO) -> None:
    """The result, with the control beside it, and where everything lies."""
    table = Table(title=f"{summary['data']}, {summary['model']} cut after {summary['cut']}")
    table.add_column("")
    learning = "both halves learn" if summary["parameters_client"] else "frozen client"
    table.add_column(learning, justify="right")
    table.add_column("control: frozen client", justify="right")
    rows = (
        (
            "test accuracy",
            _percent(summary["accuracy"]),
            _percent(summary["accuracy_frozen_client"]),
        ),
        ("test loss", _number(summary["loss"]), _number(summary["loss_frozen_client"])),
        ("seconds", _number(summary["seconds"]), _number(summary["seconds_control"])),
        ("MB up", _megabytes(summary["bytes_up"]), _megabytes(summary["control_bytes_up"])),
        ("MB down", _megabytes(summary["bytes_down"]), _megabytes(summary["control_bytes_down"])),
        ("bytes up per client-round", f"{summary['bytes_up_per_client_round']:.0f}", ""),
        ("bundle transfer, MB", _megabytes(summary["bundle_bytes_down"]), ""),
        ("energy measured, J", _joules(summary, "measured"), ""),
        ("energy modelled, J", _joules(summary, "modelled"), ""),
        ("server steps", str(summary["server_steps"]), ""),
        ("server busy while waiting, s", _number(summary["server_busy_while_waiting_s"]), ""),
        ("guards: steps rejected", str(summary["guard_rejected"]), ""),
        ("guards: scalars clipped", str(summary["guard_clipped"]), ""),
        (
            "guards: rounds shortened, server / client",
            f"{summary['guard_rounds_server']} / {summary['guard_rounds_client']}",
            "",
        ),
    )
    for row in rows:
        table.add_row(*row)
    if "simulated_s" in summary:
        control_s = _number(summary["simulated_s_control"])
        table.add_row("simulated seconds", _number(summary["simulated_s"]), control_s)
        forwards = f"{summary['client_forwards_per_client_round']:.0f}"
        table.add_row("client forwards per client-round", forwards, "")
    console = Console(file=stream, highlight=False)
    console.print(table)
    if summary.get("emulated"):
        console.print(_boards(summary["emulated"]))
    console.print(
        f"{summary['rounds']} rounds, {summary['clients']} devices, tau {summary['tau']}, "
        f"seed {summary['seed']}\nrun folder: {folder}\ncheck it:   musplit replay {folder}",
        soft_wrap=True,
    )


def _boards(rows: list[dict[str, Any]]) -> Table:
    """The devices of a fleet: a round's forwards on the board, as asked for and as emulated."""
    table = Table(title=f"emulated boards, slow motion {rows[0]['slow_motion']:g} taken out")
    table.add_column("device", justify="right")
    table.add_column("board")
    for name in ("step asked, ms", "step, ms", "modelled, J"):
        table.add_column(name, justify="right")
    for row in rows:
        asked, median = (_milliseconds(row[name]) for name in ("step_s_asked", "step_s_median"))
        modelled = f"{row['modelled_j']:.1f}" if "modelled_j" in row else "-"
        table.add_row(str(row["device"]), row["profile"], asked, median, modelled)
    return table


def _joules(summary: dict[str, Any], word: str) -> str:
    """With its bounds; the reason for no figure stands in the summary."""
    value = summary[f"{word}_energy_j"]
    if value is None:
        return f"not {word}"
    low, high = summary[f"{word}_energy_low_j"], summary[f"{word}_energy_high_j"]
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _percent(value: float | None) -> str:
    return "not run" if value is None else f"{100 * value:.1f} %"


def _milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{1e3 * value_s:.2f}"


def _number(value: float | None) -> str:
    if value is None:
        return "not run"
    return f"{value:.3f}" if value < 1e6 else f"{value:.1e}"


def _megabytes(value: int | None) -> str:
    return "not run" if value is None else f"{value / 1e6:.2f}"
