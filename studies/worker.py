"""A process that computes runs of a study: a line of JSON a run, and lines back. Ends with stdin.

Started by studies/pool.py. The runs' own prints go to stderr, which is a log file.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Final

import msgspec

from studies.backends import compute
from studies.cells import Spec, work_folder, write_cell
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.errors import MusplitError

_TELL_S: Final = 0.1  # at most so often, as a terminal is redrawn


class Task(msgspec.Struct, frozen=True):
    """A run to compute, and the study's folder where its file goes."""

    folder: str
    spec: Spec


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The part of the rounds that is done, 0 to 1."""

    part: float


class Done(msgspec.Struct, frozen=True, tag=True):
    """Empty when the file is written; otherwise why not, in one line."""

    error: str = ""


class _Teller:
    """Tells the study how far a run of `rounds` is."""

    def __init__(self, replies: IO[bytes], rounds: int) -> None:
        self._replies, self._rounds = replies, rounds
        self._told_s = time.monotonic()

    def __call__(self, rounds_done: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_S:
            self._told_s = now_s
            _send(self._replies, Progress(rounds_done / self._rounds))


def _send(replies: IO[bytes], message: Progress | Done) -> None:
    """Write a line to the study."""
    replies.write(msgspec.json.encode(message) + b"\n")
    replies.flush()


def _read(stream: IO[bytes], tasks: queue.Queue[bytes]) -> None:
    for line in stream:
        tasks.put(line)
    os._exit(0)  # the study has ended, in whatever way: nobody waits for this run


def _compute(task: Task, replies: IO[bytes]) -> Done:
    folder = Path(task.folder)
    try:
        teller = _Teller(replies, task.spec.config.run.rounds)
        write_cell(folder, task.spec, compute(task.spec, work_folder(folder), teller))
    except MusplitError as error:
        return Done(" ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001 - a run must not take the others with it
        traceback.print_exc()
        return Done(" ".join(f"{type(error).__name__}: {error}".split()))
    return Done()


def main() -> None:
    """Compute what comes in."""
    keep_freed_memory()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, tasks), daemon=True).start()
    while True:
        _send(replies, _compute(msgspec.json.decode(tasks.get(), type=Task), replies))


if __name__ == "__main__":
    main()
