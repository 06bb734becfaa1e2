"""What a run needs before any device joins: data, exported halves, and the open run folder."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from export.cuts import Halves
from export.exporter import Export, export_model
from export.inputs import SampleArray
from export.server_half import read_server_half
from server_node.config import Config, to_toml
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from server_node.evaluation import Evaluator
from server_node.half import ServerHalf
from server_node.journal import JOURNAL_FILE, Header
from server_node.ledger import Ledger
from server_node.machine import environment, fix_arithmetic
from server_node.run import Outbox, Run
from server_node.transform import check_fit, declare, explained
from wire_protocol.manifest import GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE

CONFIG_FILE = "config.toml"
CONTROL_FOLDER = "control"


class Experiment(NamedTuple):
    """A prepared experiment: run it once with the client half learning, once with it frozen."""

    config: Config
    folder: Path
    exported: Export
    evaluator: Evaluator
    server_weights: NDArray[np.float32]
    server_weights_sha256: str
    blobs: list[bytes]  # manifest, graph, weights of the client bundle
    class_names: tuple[str, ...]  # by class number; empty: the data has only numbers
    data_notes: tuple[str, ...]  # what was made of the data's source

    @property
    def manifest_bytes(self) -> bytes:
        """The client bundle's manifest as written."""
        return self.blobs[0]


def prepare(config: Config, folder: Path) -> Experiment:
    """Make the run folder: configuration as run, client and server halves. Raises InputErrors."""
    if any((place / JOURNAL_FILE).exists() for place in (folder, folder / CONTROL_FOLDER)):
        raise ConfigError(f"{folder}: holds a run already; give another --out, or remove it")
    fix_arithmetic(config.server)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    data = load_dataset(config.data)
    declared = declare(config.data, data.x_train, ["float32"] * len(data.x_train))
    arrays = [
        SampleArray(have.raw_shape, x.dtype.kind in "bui", have.transform)
        for x, have in zip(data.x_train, declared, strict=True)
    ]
    with explained(config, declared[0]):
        exported = export_model(
            config.model.name, config.model.cut, folder, seed=config.run.seed,
            input_shape=config.model.input_shape, arrays=arrays,
            weights=Path(config.model.weights) if config.model.weights else None,
        )  # fmt: skip
    check_fit(config, declared[0], exported.manifest.inputs[0].shape)
    server_manifest, server_weights = read_server_half(exported.server)
    if config.server.replicas > 1:
        shape = (config.devices.batch, *exported.manifest.activation.shape)
        _server_half(config, exported.halves, server_weights).check_batching(shape)
    blobs = [
        (exported.client / name).read_bytes() for name in (MANIFEST_FILE, GRAPH_FILE, WEIGHTS_FILE)
    ]
    evaluator = Evaluator(exported.halves.client, exported.manifest, data)
    return Experiment(
        config, folder, exported, evaluator, server_weights,
        server_manifest.weights.sha256, blobs, data.class_names, data.notes,
    )  # fmt: skip


def open_run(
    experiment: Experiment, *, frozen: bool, devices: list[tuple[int, str]], outbox: Outbox,
    notify: Callable[[dict[str, Any]], None],
) -> Run:  # fmt: skip
    """Open the journal and the files of a run; `frozen` is the control with eta_c = 0."""
    config = experiment.config
    folder = experiment.folder
    if frozen:
        method = msgspec.structs.replace(config.method, eta_c=0.0)
        config = msgspec.structs.replace(config, method=method)
        folder = folder / CONTROL_FOLDER
        folder.mkdir(exist_ok=True)
    header = Header(
        run=secrets.randbits(63), run_seed=config.run.seed, lam=config.method.lam,
        manifest_sha256=experiment.exported.digest,
        server_weights_sha256=experiment.server_weights_sha256, config_sha256=config.sha256(),
        server_device=config.server.device, server_threads=config.server.threads,
        server_replicas=config.server.replicas, environment=environment(),
    )  # fmt: skip
    client = np.frombuffer(
        experiment.blobs[2], "<f4", experiment.exported.manifest.parameters
    ).astype(np.float32)
    server = experiment.server_weights.copy()
    half = _server_half(config, experiment.exported.halves, server)
    return Run(
        config, header, experiment.exported.manifest, half, experiment.evaluator, client, server,
        Ledger(folder, header, devices), outbox, notify,
    )  # fmt: skip


def _server_half(config: Config, halves: Halves, weights: NDArray[np.float32]) -> ServerHalf:
    return ServerHalf(
        halves.server.module, weights, run_seed=config.run.seed, lam=config.method.lam,
        directions=config.method.directions_server, device=torch.device(config.server.device),
        replicas=config.server.replicas,
    )  # fmt: skip
