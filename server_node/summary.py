"""What a run came to, with the frozen-client control beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from server_node.curvature import step_rule
from server_node.energy import Energies, SoFar, Work, energy_fields
from server_node.files import replace_file
from server_node.guards import Guards
from server_node.prepare import Experiment, open_half
from server_node.recorder import read_metrics, read_rounds
from server_node.resume import History
from server_node.run import Run
from server_node.torch_half import Scores
from wire_protocol.manifest import sha256

ENERGY_FILE: Final = "energy.json"
# Why a summary has no control while that is under way.
UNFINISHED_CONTROL: Final = "the control run was not finished"


class RunResult(NamedTuple):
    """What became of a run; times in seconds, traffic in bytes of its devices' streams."""

    outcome: str
    detail: str
    scores: Scores | None
    rounds: int
    contributions: int
    resumed: int
    seconds: float
    busy_s: float
    busy_waiting_s: float
    server_steps: int
    traffic: dict[str, int]
    energies: Energies
    client_sha256: str
    server_sha256: str
    environment: dict[str, str]
    guards: Guards


def result_of(run: Run, seconds: float, resumed: int) -> RunResult:
    """The result of a run that this server finished, after `seconds` of its own."""
    ledger, finished = run.ledger, run.finished
    return RunResult(
        finished.outcome.value if finished else "interrupted", finished.detail if finished else "",
        run.scores, run.rounds_closed, run.contributions, resumed, ledger.past_s + seconds,
        ledger.busy_s, ledger.busy_waiting_s, ledger.server_steps, ledger.traffic.totals(),
        ledger.energies,
        sha256(run.client_state), sha256(run.server), run.header.environment, run.guards,
    )  # fmt: skip


def result_of_past(experiment: Experiment, history: History) -> RunResult:
    """The result of a run that an earlier start of the server finished, from its files."""
    past = history.past
    metrics = read_metrics(past.folder, past.header.run, past.rounds, experiment.config.method.tau)
    half = open_half(experiment)
    half.load(history.server)
    return RunResult(
        past.ended, "", experiment.evaluator.scores(history.client.theta, half), len(past.rounds),
        sum(len(closed.shares) for closed in past.rounds), past.resumed, metrics.total("seconds"),
        metrics.total("server_busy_s"), metrics.total("server_busy_while_waiting_s"),
        metrics.total("server_steps"), metrics.traffic().totals(), metrics.energies(),
        sha256(history.client.state),
        sha256(history.server), past.header.environment,
        Guards(experiment.config.guards, past.journal.records),
    )  # fmt: skip


def summarise(
    experiment: Experiment, main: RunResult, control: RunResult | str, broker: str | None
) -> dict[str, Any]:
    """The summary as a dictionary; what was not measured is None with a reason beside it.

    `control` is the frozen-client run, or why there is none; `broker` the protocol it spoke, None
    when no broker was needed any more.
    """
    config = experiment.config
    summary: dict[str, Any] = {
        "accuracy": main.scores.accuracy if main.scores else None,
        "loss": main.scores.loss if main.scores else None,
        "accuracy_frozen_client": None,
        "loss_frozen_client": None,
        "accuracy_frozen_client_reason": control if isinstance(control, str) else "measured",
        "outcome": main.outcome,
        "outcome_frozen_client": None,
        "rounds": main.rounds,
        "tau": config.method.tau,
        "clients": config.devices.count,
        "seed": config.run.seed,
        "model": config.model.name,
        "cut": config.model.cut,
        "data": config.data.source,
        "class_names": list(experiment.class_names) or None,
        "parameters_client": experiment.exported.manifest.parameters,
        "parameters_server": experiment.exported.server_parameters,
        "seconds": round(main.seconds, 3),
        "seconds_control": None,
        "resumed": main.resumed,
        "server_busy_s": round(main.busy_s, 3),
        "server_busy_while_waiting_s": round(main.busy_waiting_s, 3),
        **main.traffic,
        "bytes_up_per_client_round": round(
            main.traffic["bytes_up"] / max(1, main.contributions), 1
        ),
        "bytes_down_per_client_round": round(
            main.traffic["bytes_down"] / max(1, main.contributions), 1
        ),
        "control_bytes_up": None,
        "control_bytes_down": None,
        **_energy(experiment, main),
        "client_rounds": main.contributions,
        "server_steps": main.server_steps,
        **_guarded(main.guards),
        "curvature_trace_server": main.guards.curvature,
        "step_rule_server": (
            step_rule(config.method, main.guards.curvature)
            if main.guards.curvature is not None
            else None
        ),
        "client_weights_sha256": main.client_sha256,
        "server_weights_sha256": main.server_sha256,
        "config_sha256": config.sha256(),
        "bundle_sha256": experiment.exported.digest,
        "broker_protocol": broker,
        "encoding": config.wire.encoding,
        "compression": config.wire.compression,
        "server_device": config.server.device,
        "server_threads": config.server.threads,
        "server_replicas": config.server.replicas,
        "device_threads": config.devices.threads,
        "versions": main.environment,
    }
    if isinstance(control, RunResult):
        scores, traffic = control.scores, control.traffic
        summary |= {
            "accuracy_frozen_client": scores.accuracy if scores else None,
            "loss_frozen_client": scores.loss if scores else None,
            "outcome_frozen_client": control.outcome,
            "seconds_control": round(control.seconds, 3),
            "control_bytes_up": traffic["bytes_up"] + traffic["bundle_bytes_up"],
            "control_bytes_down": traffic["bytes_down"] + traffic["bundle_bytes_down"],
        }
    return summary


def _energy(experiment: Experiment, main: RunResult) -> dict[str, Any]:
    """The energy of the run that learns; the control's is in its folder."""
    config, target = experiment.config, experiment.config.evaluation.target
    rows = list(read_rounds(experiment.folder))
    reached = [row.round for row in rows if target and (row.accuracy or 0.0) >= target]
    reason = f"accuracy {target:g} was not reached" if target else "evaluation.target is not set"
    work = Work(
        main.rounds, main.contributions * config.devices.batch, min(reached, default=None),
        f"accuracy {target:g}" if reached else reason,
    )  # fmt: skip
    so_far = [SoFar(row.measured_energy_j, row.modelled_energy_j) for row in rows]
    return {"target_accuracy": target or None, **energy_fields(main.energies, work, so_far)}


def _guarded(guards: Guards) -> dict[str, int]:
    """How often guards intervened in the whole run."""
    totals = guards.totals
    return {
        "guard_rejected": totals["reject"],
        "guard_clipped": totals["clip_server"] + totals["clip_client"],
        "guard_rounds_server": totals["backtrack_server"] + totals["server_factor"],
        "guard_rounds_client": totals["backtrack_client"] + totals["client_factor"],
        "guard_rounds_not_finite": totals["not_finite_server"] + totals["not_finite_client"],
    }


def write_energies(folder: Path, energies: Energies) -> None:
    """Write FOLDER/energy.json: what every session of every device has taken, by what."""
    data = (json.dumps(energies.rows(), indent=2) + "\n").encode()
    replace_file(folder / ENERGY_FILE, lambda file: file.write(data))
