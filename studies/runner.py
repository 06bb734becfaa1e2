"""A study from its matrix to its files: what is missing is run, what is there is read.

First the trials of every tuned row, on the validation split; then, with the chosen values, the
test runs of all rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from server_node.errors import ConfigError
from server_node.files import claimed
from studies.cells import Result, Spec, cell_path, read_cell, work_folder
from studies.definition import Fields, Setting
from studies.errors import StudyError
from studies.matrix import Matrix, Row
from studies.pool import Pool
from studies.tuning import choose


class Job(NamedTuple):
    """A run and its place in the matrix; `trial` is None for a test run."""

    setting: Setting
    row: Row
    seed: int
    trial: int | None
    spec: Spec

    def __str__(self) -> str:
        trial = f", trial {self.trial + 1}" if self.trial is not None else ""
        return f"{self.setting.name}, {self.row.name}{trial}, seed {self.seed}"


class Entry(NamedTuple):
    """A row under a setting: the values chosen, the test results by seed, and what failed."""

    setting: Setting
    row: Row
    chosen: Fields
    tuned: list[list[Result]]  # by trial and seed
    results: dict[int, Result]
    specs: dict[int, Spec]
    errors: list[str]


class View(Protocol):
    """Who is told how far it is."""

    def begin(self, stage: str, total: int, finished: int, damaged: int) -> None:
        """A stage of `total` runs, of which some were `finished` before."""
        ...

    def advanced(self, job: Job, part: float) -> None:
        """Of a run under way, that part of its rounds is done."""
        ...

    def done(self, job: Job, result: Result | None, error: str) -> None:
        """A run has ended."""
        ...


class Runner:
    """Runs a study in a folder of its own."""

    def __init__(self, matrix: Matrix, folder: Path, jobs: int, view: View) -> None:
        self._matrix, self._folder, self._jobs, self._view = matrix, folder, jobs, view
        self._results: dict[str, Result] = {}  # by the run's digest
        self._errors: dict[str, str] = {}

    def run(self) -> list[Entry]:
        """Do what is missing; all rows under all settings, in the order of the file."""
        with _claimed(self._folder), Pool(self._folder, self._jobs) as pool:
            trials = trial_jobs(self._matrix)
            if trials:
                self._stage(pool, "tuning", trials)
            entries = [self._entry(*place, trials) for place in places(self._matrix)]
            tests = {
                (entry.setting.name, entry.row.name): test_jobs(self._matrix, entry)
                for entry in entries
            }
            self._stage(pool, "test", [job for jobs in tests.values() for job in jobs])
        return [self._complete(e, tests[e.setting.name, e.row.name]) for e in entries]

    def _stage(self, pool: Pool, stage: str, jobs: list[Job]) -> None:
        """Run those jobs whose files are missing or damaged. Equal runs are run once."""
        missing: dict[str, Job] = {}
        damaged = 0
        for job in jobs:
            digest = job.spec.digest
            if digest in self._results or digest in missing:
                continue
            result = read_cell(self._folder, digest)
            if result is None:
                damaged += cell_path(self._folder, digest).exists()
                missing[digest] = job
            else:
                self._results[digest] = result
        distinct = len({job.spec.digest for job in jobs})
        self._view.begin(stage, distinct, distinct - len(missing), damaged)
        todo = list(missing.items())

        def done(index: int, error: str) -> None:
            digest, job = todo[index]
            result = None if error else read_cell(self._folder, digest)
            if result is None:
                self._errors[digest] = error or "its file cannot be read"
            else:
                self._results[digest] = result
            self._view.done(job, result, self._errors.get(digest, ""))

        def advanced(index: int, part: float) -> None:
            self._view.advanced(todo[index][1], part)

        pool.run([job.spec for _, job in todo], done, advanced)

    def _entry(self, setting: Setting, row: Row, trials: list[Job]) -> Entry:
        """A row with the values that its trials speak for; none when a trial is missing."""
        mine = [job for job in trials if job.setting is setting and job.row is row]
        errors = self._failed(mine)
        if not mine or errors:
            return Entry(setting, row, {}, [], {}, {}, errors)
        tuned = [
            [self._results[job.spec.digest] for job in mine if job.trial == trial]
            for trial in range(len(row.trials))
        ]
        study = self._matrix.study
        assert study.tuning is not None
        best = choose(tuned, study.tuning.by, study.study.targets)
        return Entry(setting, row, row.trials[best], tuned, {}, {}, [])

    def _complete(self, entry: Entry, jobs: list[Job]) -> Entry:
        found = {
            job.seed: self._results[job.spec.digest]
            for job in jobs
            if job.spec.digest in self._results
        }
        specs = {job.seed: job.spec for job in jobs}
        return entry._replace(
            results=found, specs=specs, errors=[*entry.errors, *self._failed(jobs)]
        )

    def _failed(self, jobs: list[Job]) -> list[str]:
        failed = [job for job in jobs if job.spec.digest in self._errors]
        return [f"{job}: {self._errors[job.spec.digest]}" for job in failed]


def places(matrix: Matrix) -> list[tuple[Setting, Row]]:
    """Every row under every setting."""
    return [(setting, row) for setting in matrix.settings for row in matrix.rows_under(setting)]


def trial_jobs(matrix: Matrix) -> list[Job]:
    """All runs of the tuning."""
    return [
        Job(setting, row, seed, trial, matrix.spec(setting, row, values, seed, tuning=True))
        for setting, row in places(matrix)
        for trial, values in enumerate(row.trials)
        for seed in range(matrix.tuning_seeds)
    ]


def test_jobs(matrix: Matrix, entry: Entry) -> list[Job]:
    """The test runs of a row; none when its tuning failed."""
    if entry.errors:
        return []
    setting, row, chosen = entry.setting, entry.row, entry.chosen
    return [
        Job(setting, row, seed, None, matrix.spec(setting, row, chosen, seed, tuning=False))
        for seed in range(matrix.seeds)
    ]


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(claimed(folder))
        except ConfigError as error:
            raise StudyError(
                f"{folder}: another study runs in this folder; stop that one first"
            ) from error
        # Workers are killed with the study: what they were at stays behind.
        shutil.rmtree(work_folder(folder), ignore_errors=True)
        stack.callback(shutil.rmtree, work_folder(folder), ignore_errors=True)
        yield
