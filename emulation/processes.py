"""Child processes that do not outlive their parent, whatever ends it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_GRACE_S: Final = 8.0


class Processes:
    """Starts processes, each with its own log; `stop_all` ends those that are left."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self, command: Sequence[str], log: Path, *, pipe_output: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a command. Its stderr, and its stdout unless piped, is appended to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            output: int | IO[bytes] = subprocess.PIPE if pipe_output else file
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=file,
                start_new_session=True,
                preexec_fn=_die_with_parent(),  # noqa: PLW1509 - two system calls, no locks
            )  # fmt: skip
        self._running.append(process)
        return process

    def stop_all(self) -> None:
        """Ask every process to end, last started first; kill what does not within the grace."""
        alive = [process for process in reversed(self._running) if process.poll() is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline_s = time.monotonic() + _GRACE_S
        for process in alive:
            try:
                process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """A group of processes that is stopped at the end of the block, also on an error."""
    group = Processes()
    try:
        yield group
    finally:
        group.stop_all()


def wait_unlocked(locks: Sequence[Path], timeout_s: float) -> None:
    """Return once nobody holds these lock files, or after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    for path in locks:
        while path.exists() and not _is_free(path) and time.monotonic() < deadline_s:
            time.sleep(0.05)


def _is_free(path: Path) -> bool:
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def last_line(log: Path) -> str:
    """The last line of a log, for an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def musplit_command(*arguments: str) -> list[str]:
    """The command line of this installation's musplit, whatever lies in the current folder."""
    return [sys.executable, "-P", "-m", "musplit", *arguments]


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux: the kernel ends the child when its parent dies, even of SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
