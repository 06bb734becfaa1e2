"""Advice of the planner beside the exhaustive best, on fleets that it has not seen.

Once, the rounds to the target of every setting of a grid are measured: an MLP of three layers,
four devices, on the digits or on Fashion-MNIST. Then fleets are drawn by seed. For each the
planner measures a few settings of its choice (the answers come from the table), and its advice is
compared with the exhaustive best over the whole grid, in seconds of the rounds that a simulation of
that fleet would draw, and in as many rounds of mean length.

    .venv/bin/python benchmarks/planner.py digits --fleets 200 --budget 12
    .venv/bin/python benchmarks/planner.py fashion_mnist --data path/to/the/idx/files
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from server_node.config import Config
from server_node.datasets import load_dataset
from studies.planner.choice import Probe
from studies.planner.cuts import ModelCuts, model_cuts
from studies.planner.fleet import Delays, DeviceKind, Fleet, Search, Server
from studies.planner.learning import LearningTable, Observed, probe_config
from studies.planner.options import Options
from studies.planner.plan import base_config
from studies.planner.search import Found, search
from studies.planner.timing import draw_rounds, round_seconds


class Task(NamedTuple):
    """What is learned, and to where: accuracy on the held-out part within so many rounds."""

    model: str
    target: float
    rounds: int
    # Between what 4 and what 16 directions in float32 need on a device (studies/planner/limits.py).
    tight_bytes: int
    overrides: tuple[str, ...]


TASKS: Final = {
    "digits": Task("mlp:64-32-32-10", 0.65, 100, 87_600_000, ()),
    "fashion_mnist": Task(
        "mlp:196-32-32-10", 0.40, 40, 87_680_000, ("data.pool=2", "data.standardise=feature")
    ),
}
DEVICES: Final = 4
GRID: Final = Search(tau=[1, 4, 16], directions_client=[4, 16])
LEAST: Final = 4
DELAY_MODELS: Final = ("constant", "exponential", "uniform")


def draw_fleet(random: np.random.Generator, tight_bytes: int) -> Fleet:
    """Two kinds of devices, speeds and rates log-uniform over two to three decades.

    A quarter of the fleets has no more memory than `tight_bytes` a device.
    """

    def between(low: float, high: float) -> float:
        return float(np.exp(random.uniform(np.log(low), np.log(high))))

    memory = tight_bytes if random.random() < 0.25 else 500_000_000
    kinds = [
        DeviceKind(
            name, memory, between(3e3, 3e6), between(1e5, 1e7), count=DEVICES // 2,
            flops_per_s=between(1e5, 1e8),
        )
        for name in ("a", "b")
    ]  # fmt: skip
    parallel = random.random() < 0.5
    server = Server(mode="parallel" if parallel else "serial", step_s=between(1e-3, 0.3))
    delays = Delays(DELAY_MODELS[random.integers(3)], latency_s=between(1e-3, 0.3))
    return Fleet(kinds, server, delays, GRID)


def measure_all(table: LearningTable, options: Options, task: Task) -> dict[Probe, Observed]:
    """Every setting of the grid."""
    answers: dict[Probe, Observed] = {}
    for probe in options.round_s:
        config = probe_config(options.config(probe), GRID.holdout)
        answers[probe] = table.observe(config, task.target, task.rounds)
        print(f"{len(answers)}/{len(options.round_s)} {probe}: {answers[probe]}", file=sys.stderr)
    return answers


def judge(
    fleet: Fleet, base: Config, model: ModelCuts, answers: dict[Probe, Observed], budget: int
) -> dict[str, Any]:
    """Advice over best; and over the best when nothing were forbidden."""
    options = Options(fleet, base, model)

    def observe(probe: Probe, limit: int) -> Observed:
        seen = answers[probe]
        late = seen.rounds is not None and seen.rounds > limit
        return Observed(None, diverged=False) if late else seen

    found = search(options.round_s, observe, budget, base.run.rounds, LEAST)
    reached = [one for one in found if one.rounds is not None]
    if not reached:  # the planner says so and advises nothing
        return {
            "ratio": math.inf, "ratio_of_means": math.inf, "advice": "", "best": "",
            "measured": len(found), "forbidden": len(options.excluded),
            "predicted_over_simulated": 1.0,
        }  # fmt: skip
    advice = min(reached, key=lambda one: (one.rounds or 0) * options.round_s[one.probe])
    times = {
        probe: _simulated_s(options, probe, seen.rounds)
        for probe, seen in answers.items()
        if seen.rounds is not None and probe in options.round_s
    }
    best = min(times, key=times.__getitem__)
    means = [seen.rounds * options.round_s[probe] for probe in times
             if (seen := answers[probe]).rounds is not None]  # fmt: skip
    return {
        "ratio": times[advice.probe] / times[best],
        "ratio_of_means": _predicted(options, advice) / min(means),
        "advice": str(advice.probe), "best": str(best),
        "measured": len(found), "forbidden": len(options.excluded),
        "predicted_over_simulated": _predicted(options, advice) / times[advice.probe],
    }  # fmt: skip


def _predicted(options: Options, found: Found) -> float:
    return (found.rounds or math.inf) * options.round_s[found.probe]


def _simulated_s(options: Options, probe: Probe, rounds: int) -> float:
    draws = draw_rounds(options.fleet, options.base, 0, rounds)
    choice = options.choices[probe]
    cut = options.cuts[probe.cut]
    sent = options.sent(choice)
    return float(round_seconds(options.fleet, options.base, cut, choice, draws, sent).sum())


def main() -> None:
    """Print the median and the worst ratio; write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", help="where the data lie, as musplit plan --data")
    parser.add_argument("--fleets", type=int, default=200)
    parser.add_argument("--budget", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / "planner")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    random = np.random.default_rng(arguments.seed)
    roomy = msgspec.structs.replace
    fleet = draw_fleet(random, task.tight_bytes)
    fleet = roomy(fleet, device=[roomy(k, memory_bytes=1 << 40) for k in fleet.device])
    data_at = [f"data.source={arguments.data}"] if arguments.data else []
    overrides = [f"run.rounds={task.rounds}", *task.overrides, *data_at]
    base = base_config(task.model, fleet, None, overrides)
    data = load_dataset(base.data)
    model = model_cuts(base, data)
    table = LearningTable(arguments.out / "rounds.json", data, model.source)
    answers = measure_all(table, Options(fleet, base, model), task)
    rows = [
        judge(draw_fleet(random, task.tight_bytes), base, model, answers, arguments.budget)
        for _ in range(arguments.fleets)
    ]
    (arguments.out / "fleets.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    ratios = sorted(row["ratio"] for row in rows)
    within = sum(ratio <= 1.15 for ratio in ratios) / len(ratios)
    of_means = sorted(row["ratio_of_means"] for row in rows)
    predicted = [row["predicted_over_simulated"] for row in rows]
    print(f"{len(answers)} settings, {arguments.budget} measured at most, {len(rows)} fleets")
    print(f"advice over best: median {statistics.median(ratios):.3f}, worst {ratios[-1]:.3f}, "
          f"within 15 %: {within:.1%}")  # fmt: skip
    print(f"the same with a mean round for each: median {statistics.median(of_means):.3f}, "
          f"worst {of_means[-1]:.3f}")  # fmt: skip
    print(f"predicted over simulated: {min(predicted):.3f} to {max(predicted):.3f}")
    print(f"fleets with a limit: {sum(row['forbidden'] > 0 for row in rows)}; "
          f"advised settings: {len({row['advice'] for row in rows})}, best: "
          f"{len({row['best'] for row in rows})}")  # fmt: skip


if __name__ == "__main__":
    main()
