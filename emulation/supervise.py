"""Starting a process again when it ends, as a service manager would, within limits."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from emulation.processes import Processes

# In a row: ends that are the program's own fault, and kills from outside.
CRASHES: Final = 5
KILLS: Final = 50
# A process that lived this long counts from zero again.
LIVED_S: Final = 30.0
_OUTSIDE: Final = (-signal.SIGKILL, -signal.SIGTERM)


class Supervised:
    """One process of the fleet.

    `command` is asked at every start; `outside` are more codes that count as killed from outside.
    """

    def __init__(
        self, group: Processes, name: str, log: Path, command: Callable[[], list[str]], *,
        pipe_output: bool = False, outside: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.name, self.log = name, log
        self._group, self._command, self._pipe_output = group, command, pipe_output
        self._outside = (*_OUTSIDE, *outside)
        self._crashes = self._kills = 0
        self.process = self._start()

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def restart(self) -> bool:
        """Start it again after its end; False when that was once too often."""
        code = self.process.wait()
        if time.monotonic() - self._started_s >= LIVED_S:
            self._crashes = self._kills = 0
        if code in self._outside:
            self._kills += 1
        else:
            self._crashes += 1
        if self._crashes > CRASHES or self._kills > KILLS:
            return False
        self.process = self._start()
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        self._started_s = time.monotonic()
        return self._group.start(self._command(), self.log, pipe_output=self._pipe_output)
