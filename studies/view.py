"""What a user sees of a study: a bar with the time left on a terminal, a line a run elsewhere."""

from __future__ import annotations

from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from studies.cells import Result
from studies.runner import Job
from wire_protocol.messages import printable


class StudyView:
    """Shows the stages of a study."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description:>8}"), BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(), TextColumn("{task.fields[info]}"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._count = self._total = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(printable(text))

    def begin(self, stage: str, total: int, finished: int, damaged: int) -> None:
        """A stage of `total` runs, of which some were `finished` before."""
        before = f", {finished} of them finished before" if finished else ""
        again = f", {damaged} damaged and run again" if damaged else ""
        self.say(f"{stage}: {total} runs{before}{again}")
        self._count, self._total = finished, total
        if self._task is not None:
            self._progress.stop_task(self._task)
        # What was finished before says nothing about the time left: it is no part of the bar.
        self._task = self._progress.add_task(stage, total=total - finished, info="")

    def done(self, job: Job, result: Result | None, error: str) -> None:
        """A run has ended."""
        self._count += 1
        if result is None:
            text = f"failed: {error}"
        else:
            last = f"{result.points[-1].accuracy:.3f}" if result.points else "no point"
            text = f"{last}, {result.outcome}, {result.seconds:.1f} s"
        if self._task is not None:
            self._progress.update(self._task, advance=1, info=printable(str(job)))
        if result is None or not self._console.is_terminal:
            self.say(f"{self._count}/{self._total} {job}: {text}")
