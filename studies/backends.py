"""How a run of a study is computed: our method in this process, a baseline by its name."""

from __future__ import annotations

import tempfile
import time
from importlib import import_module
from pathlib import Path

import msgspec
import numpy as np

from emulation.inprocess import InProcessFleet
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.prepare import prepare
from server_node.recorder import read_rounds
from studies.cells import Point, Result, Spec, finite
from studies.definition import BASELINE
from studies.errors import CellError


def compute(spec: Spec) -> Result:
    """Run it. Raises MusplitError."""
    begin_s = time.monotonic()
    result = _baseline(spec) if spec.kind.startswith(BASELINE) else _musplit(spec.config)
    return msgspec.structs.replace(result, seconds=round(time.monotonic() - begin_s, 3))


def _musplit(config: Config) -> Result:
    """Barrier rounds as fast as they go: no simulated time, and no wire whose bytes could count."""
    with tempfile.TemporaryDirectory(prefix="musplit-study-") as folder:
        experiment = prepare(config, Path(folder))
        run = InProcessFleet(experiment).run()
        rows = list(read_rounds(Path(folder)))
    points: list[Point] = []
    client_rounds = steps = 0
    for row in rows:
        client_rounds += row.contributions
        steps += row.server_steps or 0
        if row.accuracy is None:
            continue
        points.append(
            Point(
                row.round + 1, None, row.accuracy, finite(row.loss), None, None,
                float(client_rounds * (1 + 2 * run.directions)), steps,
            )
        )  # fmt: skip
    return Result(
        points, run.finished.outcome.value if run.finished else "interrupted", client_rounds,
        len(load_dataset(config.data).y_train), experiment.exported.manifest.parameters,
        experiment.exported.server_parameters,
        not np.array_equal(run.client, experiment.client.initial_parameters()), 0.0,
    )  # fmt: skip


def _baseline(spec: Spec) -> Result:
    """A method of studies/baselines, by its name there."""
    try:
        baselines, harness = import_module("studies.baselines"), import_module("studies.harness")
    except ModuleNotFoundError as error:
        raise CellError(f"kind {spec.kind!r}: this installation has no baselines") from error
    bench = harness.make_bench(spec.config)
    name = spec.kind.removeprefix(BASELINE)
    points = [_point(p) for p in baselines.run_baseline(name, bench, spec.options)]
    if not points:
        raise CellError(f"kind {spec.kind!r}: gave no point")
    config = spec.config
    diverged = points[-1].loss is None or points[-1].round < config.run.rounds
    return Result(
        points, "diverged" if diverged else "complete", points[-1].round * config.participants,
        len(load_dataset(config.data).y_train), None, None, None, 0.0,
    )  # fmt: skip


def _point(point: object) -> Point:
    """A baseline's point as ours: the fields of the same names."""
    fields = {f.name: getattr(point, f.name) for f in msgspec.structs.fields(Point)}
    return Point(**{**fields, "loss": finite(fields["loss"])})
