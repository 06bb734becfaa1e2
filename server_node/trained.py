"""The model that a run has trained, from its folder: scored again, and taken out of the kit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from export.client_half import ClientHalf, read_client_half
from export.exporter import fill_half, load_halves
from export.server_half import read_server_half
from export.trained import Trained, export_trained
from server_node.config import Config, load_config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from server_node.evaluation import Evaluator
from server_node.files import CONFIG_FILE
from server_node.half import ServerHalf
from server_node.machine import fix_arithmetic
from server_node.prepare import control_config
from server_node.resume import History, check_identity, read_past, rebuild
from server_node.summary_file import read_summary
from wire_protocol.manifest import CLIENT_FOLDER, SERVER_FOLDER


class TrainedRun(NamedTuple):
    """A run folder's halves, and the weights that its journal leads to."""

    config: Config
    client: ClientHalf
    server: Path  # the server half's folder
    history: History


def open_trained(folder: Path) -> TrainedRun:
    """The state of the run in FOLDER after its last closed round; nothing is changed there.

    FOLDER may be a run's control/ too. Raises ConfigError, HalfError, JournalError.
    """
    own = (folder / CLIENT_FOLDER).is_dir()
    home = folder if own else folder.parent
    if not (home / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder}: holds no run ({CONFIG_FILE} is missing)")
    config = load_config(home / CONFIG_FILE, [])
    past = read_past(folder)
    if past is None:
        raise ConfigError(f"{folder}: no round was closed, so nothing was trained")
    client = read_client_half(home / CLIENT_FOLDER)
    server_manifest, server_weights = read_server_half(home / SERVER_FOLDER)
    digest = (config if own else control_config(config)).sha256()
    check_identity(past, digest, client.digest, server_manifest.weights.sha256)
    history = rebuild(past, client.initial_parameters(), server_weights)
    return TrainedRun(config, client, home / SERVER_FOLDER, history)


def evaluate_run(folder: Path, data: str | None) -> dict[str, Any]:
    """Score the run in FOLDER on its own test set, or on that of `data`; in the run's threads.

    On the machine of the run, without another `data`, the scores are the run's to the last bit.
    Raises InputErrors.
    """
    run = open_trained(folder)
    notes = list(run.history.notes)
    section = run.config.server
    if section.device == "cuda" and not torch.cuda.is_available():
        section = msgspec.structs.replace(section, device="cpu")
        notes.append("no CUDA device here: scored on the CPU, which rounds otherwise")
    fix_arithmetic(section)
    source = run.config.data
    if data is not None:
        source = msgspec.structs.replace(source, source=data)
    halves = load_halves(run.server)
    fill_half(halves.client, run.client.weights)
    test_set = load_dataset(source)
    evaluator = Evaluator(halves.client, run.client.manifest, test_set)
    half = ServerHalf(
        halves.server.module, run.history.server, run_seed=run.config.run.seed,
        lam=run.config.method.lam, directions=1, device=torch.device(section.device), replicas=1,
    )  # fmt: skip
    scores = evaluator.scores(run.history.client.theta, half)
    summary = read_summary(folder) or {}
    return {
        "accuracy": scores.accuracy, "loss": scores.loss, "samples": len(test_set.y_test),
        "data": test_set.name, "rounds": len(run.history.past.rounds),
        "accuracy_of_summary": summary.get("accuracy") if data is None else None,
        "notes": [*notes, *test_set.notes],
    }  # fmt: skip


def export_run(folder: Path, out: Path) -> Trained:
    """Write the trained model of FOLDER to OUT: model.onnx, model.safetensors, model.json.

    Raises InputErrors, and ParityError.
    """
    run = open_trained(folder)
    return export_trained(run.server, run.client, run.history.client.theta, run.history.server, out)
