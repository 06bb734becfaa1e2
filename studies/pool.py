"""Worker processes that compute a study's runs side by side, one thread each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final, Self

import msgspec

from studies.cells import Spec
from studies.worker import Done, Progress, Task

_THREADS: Final = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_GRACE_S: Final = 5.0
Ended = Callable[[int, str], None]  # a run's index, and why it failed, if it did
Advanced = Callable[[int, float], None]  # a run's index, and the part of it that is done


class Pool:
    """`jobs` workers at most, started when needed; all end with the block."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._folder, self._jobs = folder, jobs
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._running: list[subprocess.Popen[bytes]] = []
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._jobs = 0
            for process in self._running:
                process.kill()  # a run's file is there or not: nothing is lost by it
            for process in self._running:
                process.wait(_GRACE_S)
                for pipe in (process.stdin, process.stdout):
                    assert pipe is not None
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def run(self, specs: Sequence[Spec], done: Ended, advanced: Advanced) -> None:
        """Compute all; both are called in threads, one call at a time."""
        threads = ThreadPoolExecutor(max(1, self._jobs))
        try:
            futures = [
                threads.submit(self._one, index, spec, done, advanced)
                for index, spec in enumerate(specs)
            ]
            for future in futures:
                future.result()
            wait(futures)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _one(self, index: int, spec: Spec, done: Ended, advanced: Advanced) -> None:
        with self._lock:
            if not self._jobs:
                return
            process = self._idle.pop() if self._idle else self._start()

        def progress(part: float) -> None:
            with self._lock:
                if self._jobs:
                    advanced(index, part)

        error = self._ask(process, spec, progress)
        with self._lock:
            if not self._jobs:
                return
            if process.poll() is None:
                self._idle.append(process)
            done(index, error)

    def _ask(
        self, process: subprocess.Popen[bytes], spec: Spec, progress: Callable[[float], None]
    ) -> str:
        """Have a run computed; empty, or why it failed."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(Task(str(self._folder), spec)) + b"\n")
            process.stdin.flush()
            for line in process.stdout:
                message = msgspec.json.decode(line, type=Progress | Done)
                if isinstance(message, Done):
                    return message.error
                progress(message.part)
        except BrokenPipeError:
            pass
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {how}; see {self._folder / 'logs'}"

    def _start(self) -> subprocess.Popen[bytes]:
        log = self._folder / "logs" / f"worker-{self._started}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started += 1
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "studies.worker"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, start_new_session=True,
                env={**os.environ, **_THREADS},
            )  # fmt: skip
        self._running.append(process)
        return process
