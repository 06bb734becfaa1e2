"""summary.json: what a run came to, with the frozen-client control beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from server_node.prepare import Experiment
from server_node.run import Run
from wire_protocol.manifest import sha256

SUMMARY_FILE: Final = "summary.json"


class RunResult(NamedTuple):
    """A finished run, how long it took, and the bytes of its devices' streams."""

    run: Run
    seconds: float
    traffic: dict[str, int]


def summarise(
    experiment: Experiment, main: RunResult, control: RunResult | str, broker: str
) -> dict[str, Any]:
    """The summary as a dictionary; what was not measured is None with a reason beside it.

    `control` is the frozen-client run, or why there is none.
    """
    config, run = experiment.config, main.run
    summary: dict[str, Any] = {
        "accuracy": run.scores.accuracy if run.scores else None,
        "loss": run.scores.loss if run.scores else None,
        "accuracy_frozen_client": None,
        "loss_frozen_client": None,
        "accuracy_frozen_client_reason": control if isinstance(control, str) else "measured",
        "outcome": _outcome(run),
        "outcome_frozen_client": None,
        "rounds": run.rounds_closed,
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
        "server_busy_s": round(run.ledger.busy_s, 3),
        "server_busy_while_waiting_s": round(run.ledger.busy_waiting_s, 3),
        **main.traffic,
        "bytes_up_per_client_round": round(main.traffic["bytes_up"] / max(1, run.contributions), 1),
        "bytes_down_per_client_round": round(
            main.traffic["bytes_down"] / max(1, run.contributions), 1
        ),
        "control_bytes_up": None,
        "control_bytes_down": None,
        "client_rounds": run.contributions,
        "server_steps": run.ledger.server_steps,
        "client_weights_sha256": sha256(run.client),
        "server_weights_sha256": sha256(run.server),
        "config_sha256": config.sha256(),
        "bundle_sha256": experiment.exported.digest,
        "broker_protocol": broker,
        "encoding": config.wire.encoding,
        "compression": config.wire.compression,
        "server_device": config.server.device,
        "server_threads": config.server.threads,
        "server_replicas": config.server.replicas,
        "device_threads": config.devices.threads,
        "versions": run.header.environment,
    }
    if isinstance(control, RunResult):
        scores, traffic = control.run.scores, control.traffic
        summary |= {
            "accuracy_frozen_client": scores.accuracy if scores else None,
            "loss_frozen_client": scores.loss if scores else None,
            "outcome_frozen_client": _outcome(control.run),
            "seconds_control": round(control.seconds, 3),
            "control_bytes_up": traffic["bytes_up"] + traffic["bundle_bytes_up"],
            "control_bytes_down": traffic["bytes_down"] + traffic["bundle_bytes_down"],
        }
    return summary


def _outcome(run: Run) -> str:
    return run.finished.outcome.value if run.finished else "interrupted"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write FOLDER/summary.json."""
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
