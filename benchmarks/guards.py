"""What the guards do to large steps and a large tau, and what they cost.

Hard cases on the MLP of experiments/fashion_mnist.toml, and the safe ones as shipped, with every
guard alone and together; in-process fleet, whose digests are those of real processes.

    .venv/bin/python benchmarks/guards.py --data path/to/fashion_mnist
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from emulation.inprocess import InProcessFleet
from server_node.config import load_config
from server_node.prepare import prepare

CONFIG: Final = Path(__file__).resolve().parent.parent / "experiments" / "fashion_mnist.toml"
CASES: Final = {
    "safe, as shipped": (),
    "safe, Dirichlet 0.1": ("data.alpha=0.1", "method.eta_s=0.003"),
    "Dirichlet 0.1, eta_s 1e-2": ("data.alpha=0.1", "method.eta_s=0.01"),
    "eta_s 1e-1": ("method.eta_s=0.1",),
    "deep server, eta_s 8e-3": ("model.name=mlp:196-32-32-32-32-32-10", "method.eta_s=0.008"),
    "eta_c 2 (ten times)": ("method.eta_c=2.0",),
}
GUARDS: Final = {
    "none": (),
    "clip 1.5": ("guards.clip=1.5",),
    "reject": ("guards.reject=true",),
    "backtrack_server": ("guards.backtrack_server=true",),
    "backtrack_client": ("guards.backtrack_client=true",),
    "reject + both backtracks": (
        "guards.reject=true", "guards.backtrack_server=true", "guards.backtrack_client=true",
    ),
    "all": (
        "guards.clip=1.5", "guards.reject=true", "guards.backtrack_server=true",
        "guards.backtrack_client=true",
    ),
}  # fmt: skip


def play(overrides: list[str]) -> dict[str, Any]:
    """One run: its accuracy, outcome, interventions and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = prepare(load_config(CONFIG, overrides), Path(folder))
        begin_s = time.process_time()
        run = InProcessFleet(experiment).run()
        cpu_s = time.process_time() - begin_s
    return {
        "overrides": overrides,
        "accuracy": run.scores.accuracy if run.scores else None,
        "outcome": run.finished.outcome.value if run.finished else None,
        "rounds": run.rounds_closed,
        "cpu_ms_per_round": 1000 * cpu_s / max(1, run.rounds_closed),
        "curvature": run.guards.curvature,
        "guards": dict(run.guards.totals),
    }


def main() -> None:
    """Run every case with every guard; print a line a run and a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="the IDX files of Fashion-MNIST")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--guard", action="append", choices=GUARDS, help="default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/guards.jsonl"))
    arguments = parser.parse_args()
    guards = arguments.guard or list(GUARDS)
    common = [f"data.source={arguments.data}", f"run.rounds={arguments.rounds}"]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"| case | {' | '.join(guards)} |\n|---|{'---|' * len(guards)}", flush=True)
    for case in arguments.case or CASES:
        cells = []
        for guard in guards:
            results = [
                play([*common, *CASES[case], *GUARDS[guard], f"run.seed={seed}"])
                for seed in range(arguments.seeds)
            ]
            with arguments.out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"case": case, "guard": guard, **r}) + "\n"
                                for r in results)  # fmt: skip
            cells.append(", ".join(_cell(result) for result in results))
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


def _cell(result: dict[str, Any]) -> str:
    diverged = "" if result["outcome"] == "complete" else f" ({result['outcome']})"
    return f"{result['accuracy']:.3f}{diverged}"


if __name__ == "__main__":
    main()
