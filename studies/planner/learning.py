"""Rounds to a target accuracy: measured by short runs in this process, kept in a file.

With a full barrier and a fixed tau the rounds do not depend on how fast anybody is, so what was
measured for one fleet counts for every other of as many devices. A run is kept under the digest of
its configuration and its data; it is repeated only when it was cut before the round now asked for.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from emulation.inprocess import InProcessFleet
from server_node.actions import Outcome
from server_node.config import Config
from server_node.files import replace_file
from server_node.prepare import prepare
from server_node.recorder import read_rounds
from server_node.run import Run
from server_node.samples import Dataset
from server_node.sections import (
    EmulationSection,
    ServerSection,
    SimulationSection,
    WireSection,
)
from studies.planner.errors import TableError

# Rounds between two scores of a probe.
EVERY = 2


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. `accuracy` is that after rounds EVERY, 2 EVERY, ..; it ended after `rounds`."""

    settings: dict[str, Any]
    rounds: int
    accuracy: list[float]
    ended: Literal["complete", "stopped", "diverged"]


class Observed(NamedTuple):
    """What a table tells of a run, as if it had been asked for `limit` rounds at most."""

    rounds: int | None  # to the target; None: not within the limit
    diverged: bool


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1] = 1
    runs: dict[str, Measured] = {}


class LearningTable:
    """The measured runs of a file; `made` counts those that were made here."""

    def __init__(self, path: Path | None, data: Dataset, source: bytes) -> None:
        self._path = path
        self._facts = hashlib.sha256(source)
        arrays = (*data.x_train, data.y_train, *data.x_test, data.y_test, *data.x_public)
        for array in arrays:
            self._facts.update(array.tobytes())
        self._runs = _read(path) if path is not None else {}
        self.made = 0

    def observe(self, config: Config, target: float, limit: int) -> Observed:
        """Rounds of a configuration to the target, or that it needs more than `limit`.

        The answer does not depend on what else the file holds. Raises InputErrors of the run.
        """
        digest = self._digest(config)
        run = self._runs.get(digest)
        if run is None or not (_reached(run, target) or run.rounds >= limit or _final(run)):
            run = _measure(config, target, limit)
            self.made += 1
            self._keep(digest, run)
        reached = _reached(run, target)
        if reached is not None and reached <= limit:
            return Observed(reached, diverged=False)
        return Observed(None, diverged=run.ended == "diverged" and run.rounds <= limit)

    def _digest(self, config: Config) -> str:
        facts = self._facts.copy()
        facts.update(config.sha256().encode())
        if config.model.weights:
            facts.update(Path(config.model.weights).read_bytes())
        return facts.hexdigest()

    def _keep(self, digest: str, run: Measured) -> None:
        self._runs[digest] = run
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Another planner may have added to the file meanwhile.
        self._runs = {**_read(self._path), **self._runs}
        text = msgspec.json.format(msgspec.json.encode(_File(runs=self._runs)), indent=1)
        replace_file(self._path, lambda file: file.write(text + b"\n"))


def probe_config(config: Config, holdout: float) -> Config:
    """The configuration that learning alone depends on: no clock, no wire, a held-out part."""
    data = config.data
    if not data.holdout:
        data = msgspec.structs.replace(data, holdout=holdout)
    return msgspec.structs.replace(
        config, data=data, wire=WireSection(), server=ServerSection(),
        emulation=EmulationSection(), simulation=SimulationSection(),
        evaluation=msgspec.structs.replace(config.evaluation, every=EVERY, control=False),
    )  # fmt: skip


def _measure(config: Config, target: float, limit: int) -> Measured:
    def enough(run: Run) -> bool:
        reached = run.scores is not None and run.scores.accuracy >= target
        # Before EVERY rounds nothing but the initial weights was scored.
        return run.rounds_closed >= limit or (reached and run.rounds_closed >= EVERY)

    with tempfile.TemporaryDirectory(prefix="musplit-plan-") as folder:
        run = InProcessFleet(prepare(config, Path(folder))).run(enough=enough)
        rows = list(read_rounds(Path(folder)))
    ended: Literal["complete", "stopped", "diverged"] = "stopped"
    if run.finished is not None:
        ended = "complete" if run.finished.outcome is Outcome.COMPLETE else "diverged"
    return Measured(
        {"cut": config.model.cut, **msgspec.to_builtins(config.method)}, run.rounds_closed,
        [row.accuracy for row in rows if row.accuracy is not None],
        ended,
    )  # fmt: skip


def _reached(run: Measured, target: float) -> int | None:
    for index, accuracy in enumerate(run.accuracy):
        if accuracy >= target:
            return min((index + 1) * EVERY, run.rounds)
    return None


def _final(run: Measured) -> bool:
    return run.ended != "stopped"


def _read(path: Path) -> dict[str, Measured]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).runs
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise TableError(f"{path}: no table of measured rounds ({error}); remove it") from error
