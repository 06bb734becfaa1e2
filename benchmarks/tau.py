"""Does tau buy rounds, and does the device half learn? Three seeds, frozen controls beside.

Rows: the experiment as shipped; the same with the client half frozen; tau 1 at the same steps; and
both tau tuned by the same budget on a fifth of the training set held out: of the pairs of steps
with which neither of two seeds diverges, the one that reaches the target accuracy there in the
fewest rounds. Same model, shards, K and rounds in every row; in-process fleet, whose digests are
those of real processes.

    .venv/bin/python benchmarks/tau.py digits
    .venv/bin/python benchmarks/tau.py fashion_mnist --data path/to/fashion_mnist
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from emulation.inprocess import InProcessFleet
from server_node.config import load_config
from server_node.prepare import prepare

CONFIGS: Final = Path(__file__).resolve().parent.parent / "experiments"
SEEDS: Final = (0, 1, 2)
TUNING_SEEDS: Final = (0, 1)


class Experiment(NamedTuple):
    """What is compared: a shipped configuration, its target, and the grid of each tau."""

    target: float
    eta_c: tuple[float, ...]
    eta_s: dict[int, tuple[float, ...]]
    settings: dict[str, tuple[str, ...]]  # name -> overrides; the first is the one tuned in


EXPERIMENTS: Final = {
    "digits": Experiment(
        0.85, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        {1: (0.05, 0.15, 0.45), 16: (0.01, 0.02, 0.04)}, {"iid": ()},
    ),
    "fashion_mnist": Experiment(
        0.65, (0.12, 0.25, 0.35, 0.5),
        {1: (0.02, 0.03, 0.05, 0.07), 16: (0.003, 0.005, 0.007, 0.01)},
        {"iid": (), "Dirichlet 0.5": ("data.alpha=0.5",)},
    ),
}  # fmt: skip


class Job(NamedTuple):
    """One run."""

    row: str
    overrides: tuple[str, ...]
    frozen: bool = False


def run_job(config: Path, target: float, job: Job) -> dict[str, Any]:
    """Run a job in this process; returns its accuracy, and rounds to the target (or None)."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = prepare(load_config(config, list(job.overrides)), Path(folder))
        run = InProcessFleet(experiment).run(frozen=job.frozen)
        table = Path(folder) / ("control" if job.frozen else "") / "rounds.jsonl"
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    reached = [row["round"] + 1 for row in rows if (row["accuracy"] or 0.0) >= target]
    return {
        "row": job.row,
        "overrides": list(job.overrides),
        "frozen": job.frozen,
        "accuracy": run.scores.accuracy if run.scores else None,
        "rounds_to_target": min(reached, default=None),
        "outcome": run.finished.outcome.value if run.finished else None,
    }


class Bench:
    """Runs jobs in parallel processes and tells how far it is."""

    def __init__(
        self, pool: ProcessPoolExecutor, config: Path, experiment: Experiment, common: list[str]
    ) -> None:
        self._pool, self._common = pool, common
        self._run = partial(run_job, config, experiment.target)
        self._experiment = experiment
        self.results: list[dict[str, Any]] = []

    def run(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """All results, in the order of the jobs."""
        full = [job._replace(overrides=(*job.overrides, *self._common)) for job in jobs]
        results: list[dict[str, Any]] = []
        for done in self._pool.map(self._run, full):
            results.append(done)
            print(
                f"{len(results)}/{len(jobs)} {done['row']}: {done['accuracy']:.3f}, target after "
                f"{done['rounds_to_target'] or 'never'}, {done['outcome']}", file=sys.stderr,
            )  # fmt: skip
        self.results += results
        return results

    def tune(self, tau: int) -> tuple[str, ...]:
        """The pair of steps that reaches the target first on the held-out fifth, and is stable."""
        pairs = itertools.product(self._experiment.eta_c, self._experiment.eta_s[tau])
        steps = [(f"method.tau={tau}", f"method.eta_c={c}", f"method.eta_s={s}") for c, s in pairs]
        held_out = ("data.holdout=0.2", "evaluation.every=2")
        results = self.run(
            [
                Job(f"tuning tau {tau}", (*pair, *held_out, f"run.seed={seed}"))
                for pair in steps
                for seed in TUNING_SEEDS
            ]
        )
        seeds = len(TUNING_SEEDS)
        ranks = [_rank(results[first : first + seeds]) for first in range(0, len(results), seeds)]
        return steps[ranks.index(min(ranks))]


def _rank(group: list[dict[str, Any]]) -> tuple[bool, float, float]:
    """The smaller the better: no divergence, rounds to the target, accuracy."""
    rounds = [result["rounds_to_target"] or sys.maxsize for result in group]
    return (
        any(result["outcome"] != "complete" for result in group),
        statistics.mean(rounds),
        -statistics.mean(result["accuracy"] for result in group),
    )


def tabulate(rows: list[Job], results: list[dict[str, Any]], target: float) -> str:
    """A Markdown table: one line a row, mean and range over seeds."""
    lines = [
        f"| row | steps | accuracy, mean (min to max) | rounds to {target} |",
        "|---|---|---|---|",
    ]
    for job in rows:
        mine = [result for result in results if result["row"] == job.row]
        scores = [result["accuracy"] for result in mine]
        reached = ", ".join(str(result["rounds_to_target"] or "never") for result in mine)
        steps = " ".join(o.removeprefix("method.") for o in job.overrides if "eta" in o)
        lines.append(
            f"| {job.row} | {steps or 'as shipped'} | {statistics.mean(scores):.3f} "
            f"({min(scores):.3f} to {max(scores):.3f}) | {reached} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything; print a Markdown table, write it and the raw results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", help="where the data lie, as musplit emulate --data")
    parser.add_argument("--out", type=Path, help="default: runs/tau-EXPERIMENT")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    out = arguments.out or Path("runs") / f"tau-{arguments.experiment}"
    out.mkdir(parents=True, exist_ok=True)
    experiment = EXPERIMENTS[arguments.experiment]
    common = [f"data.source={arguments.data}"] if arguments.data else []
    with ProcessPoolExecutor(arguments.processes) as pool:
        config = CONFIGS / f"{arguments.experiment}.toml"
        bench = Bench(pool, config, experiment, common)
        tuned = {tau: bench.tune(tau) for tau in (1, 16)}
        rows = [
            Job(f"{name}, {row}", (*steps, *overrides), frozen)
            for name, overrides in experiment.settings.items()
            for row, steps, frozen in (
                ("tau 16", (), False),
                ("tau 16, frozen client", (), True),
                ("tau 1, the same steps", ("method.tau=1",), False),
                ("tau 1, tuned steps", tuned[1], False),
                ("tau 16, tuned steps", tuned[16], False),
            )
        ]
        seeded = [
            job._replace(overrides=(*job.overrides, f"run.seed={seed}", "evaluation.every=1"))
            for job in rows
            for seed in SEEDS
        ]
        results = bench.run(seeded)
    (out / "results.json").write_text(json.dumps(bench.results, indent=1) + "\n", encoding="utf-8")
    table = tabulate(rows, results, experiment.target)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
