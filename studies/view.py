"""What a user sees of a study: a bar with the time left on a terminal, a line a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from studies.cells import Result
from studies.runner import Job
from wire_protocol.messages import printable

_SILENCE_S: Final = 60.0  # the longest without a line where there is no bar
_SPEED_S: Final = 600.0  # the time left goes by the speed over so long: runs differ


class StudyView:
    """Shows the stages of a study."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description:>8}"), BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}% {task.fields[ended]}/{task.total:.0f}"),
            TimeRemainingColumn(), TextColumn("{task.fields[info]}"),
            console=self._console, disable=not self._console.is_terminal,
            speed_estimate_period=_SPEED_S,
        )  # fmt: skip
        self._clock = clock
        self._task: TaskID | None = None
        self._before = self._count = self._total = 0
        self._parts: dict[str, float] = {}  # of the runs under way
        self._said_s = clock()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(printable(text))
        self._said_s = self._clock()

    def begin(self, stage: str, total: int, finished: int, damaged: int) -> None:
        """A stage of `total` runs, of which some were `finished` before."""
        before = f", {finished} of them finished before" if finished else ""
        again = f", {damaged} damaged and run again" if damaged else ""
        self.say(f"{stage}: {total} runs{before}{again}")
        self._before, self._count, self._total = finished, finished, total
        self._parts = {}
        if self._task is not None:
            self._progress.stop_task(self._task)
        # What was finished before says nothing about the time left: it is no part of the bar.
        self._task = self._progress.add_task(stage, total=total - finished, ended=0, info="")

    def advanced(self, job: Job, part: float) -> None:
        """Of a run under way, that part of its rounds is done."""
        self._parts[str(job)] = part
        self._draw(job)
        if not self._console.is_terminal and self._clock() - self._said_s >= _SILENCE_S:
            under_way = "; ".join(f"{name}: {part:.0%}" for name, part in self._parts.items())
            self.say(f"{self._count}/{self._total}, under way {under_way}")

    def done(self, job: Job, result: Result | None, error: str) -> None:
        """A run has ended."""
        self._count += 1
        self._parts.pop(str(job), None)
        if result is None:
            text = f"failed: {error}"
        else:
            last = f"{result.points[-1].accuracy:.3f}" if result.points else "no point"
            text = f"{last}, {result.outcome}, {result.seconds:.1f} s"
        self._draw(job)
        if result is None or not self._console.is_terminal:
            self.say(f"{self._count}/{self._total} {job}: {text}")

    def _draw(self, job: Job) -> None:
        ended = self._count - self._before
        if self._task is not None:
            self._progress.update(
                self._task, completed=ended + sum(self._parts.values()), ended=ended,
                info=printable(str(job)),
            )  # fmt: skip
