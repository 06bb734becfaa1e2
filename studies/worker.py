"""A process that computes runs of a study, one line of JSON each way a run. Ends with its stdin.

Started by studies/pool.py. The runs' own prints go to stderr, which is a log file.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import IO

import msgspec

from studies.backends import compute
from studies.cells import Spec, work_folder, write_cell
from wire_protocol.allocator import keep_freed_memory
from wire_protocol.errors import MusplitError


class Task(msgspec.Struct, frozen=True):
    """A run to compute, and the study's folder where its file goes."""

    folder: str
    spec: Spec


class Done(msgspec.Struct, frozen=True):
    """Empty when the file is written; otherwise why not, in one line."""

    error: str = ""


def _read(stream: IO[bytes], tasks: queue.Queue[bytes]) -> None:
    for line in stream:
        tasks.put(line)
    os._exit(0)  # the study has ended, in whatever way: nobody waits for this run


def _compute(task: Task) -> Done:
    folder = Path(task.folder)
    try:
        write_cell(folder, task.spec, compute(task.spec, work_folder(folder)))
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
        done = _compute(msgspec.json.decode(tasks.get(), type=Task))
        replies.write(msgspec.json.encode(done) + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
