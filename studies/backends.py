"""How a run of a study is computed: our method on the virtual clock, a baseline by its name."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from emulation.fit import fit_timings
from emulation.simulate import Simulation, make_delays, patience
from server_node.actions import Outcome
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.prepare import prepare
from studies.baselines import run_baseline
from studies.cells import Point, Result, Spec, finite
from studies.definition import BASELINE
from studies.errors import CellError
from studies.harness import Advanced, Bench
from studies.harness import Setting as BenchSetting
from wire_protocol.client_optimiser import ClientRule, ClientState
from wire_protocol.manifest import sha256


def compute(spec: Spec, work: Path, advanced: Advanced) -> Result:
    """Run it, in a folder below `work` that is gone afterwards. Raises MusplitError."""
    begin_s = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        if spec.kind.startswith(BASELINE):
            result = _baseline(spec, Path(folder), advanced)
        else:
            result = _musplit(spec.config, Path(folder), advanced)
    return msgspec.structs.replace(result, seconds=round(time.monotonic() - begin_s, 3))


def _musplit(config: Config, folder: Path, advanced: Advanced) -> Result:
    """Our method, simulated: the coordinator, the device step and the bytes of the real thing."""
    data = load_dataset(config.data)
    simulation = Simulation(config, folder, data)
    steps: list[int] = []  # after each round, as the client rounds
    client_rounds: list[int] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            steps.append((steps[-1] if steps else 0) + event["server_steps"])
            before = client_rounds[-1] if client_rounds else 0
            client_rounds.append(before + event["contributions"])
            advanced(len(steps))

    played = simulation.play(note)
    outcome = played.result.outcome
    if outcome == Outcome.STALLED.value:
        raise CellError(f"the run stalled: {played.result.detail}; set {patience(config)}")
    points = [
        Point(
            row.round + 1, row.simulated_s, row.accuracy, finite(row.loss), row.bytes_up,
            row.bytes_down, float(row.client_forwards), done,
        )
        for row, done in zip(played.rows, steps, strict=True)
        if row.accuracy is not None
    ]  # fmt: skip
    experiment, method = simulation.experiment, config.method
    rule = ClientRule(method.client_optimiser, method.momentum, method.beta2)
    initial = ClientState(rule, experiment.client.initial_parameters())
    # Beside the costs of the last point: a run may diverge long after that.
    scored = client_rounds[points[-1].round - 1] if points else 0
    return Result(
        points, outcome, scored, len(data.y_train),
        experiment.exported.manifest.parameters, experiment.exported.server_parameters,
        played.result.client_sha256 != sha256(initial.state), 0.0,
    )  # fmt: skip


def _baseline(spec: Spec, folder: Path, advanced: Advanced) -> Result:
    """A method of studies/baselines, by its name there, with the delays of the configuration."""
    config = spec.config
    section = config.simulation
    experiment = prepare(config, folder)
    timings = fit_timings(Path(section.recorded)) if section.compute == "recorded" else None
    delays = make_delays(experiment, timings)
    bench = Bench(BenchSetting(config, delays, section.server), experiment, advanced)
    run = run_baseline(spec.kind.removeprefix(BASELINE), bench, spec.options)
    if not run:
        raise CellError(f"kind {spec.kind!r}: gave no point")
    points = [
        Point(
            p.round, p.simulated_s, p.accuracy, finite(p.loss), p.bytes_up, p.bytes_down,
            p.client_forwards, p.server_steps,
        )
        for p in run
    ]  # fmt: skip
    diverged = points[-1].loss is None or points[-1].round < config.run.rounds
    return Result(
        points, "diverged" if diverged else "complete", run[-1].client_batches,
        len(load_dataset(config.data).y_train), experiment.exported.manifest.parameters,
        experiment.exported.server_parameters, None, 0.0,
    )  # fmt: skip
