"""What a run needs before any device joins: data, exported halves, and the open run folder."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable
from importlib.metadata import version
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
from server_node.datasets import fit_transform, load_dataset
from server_node.errors import ConfigError
from server_node.evaluation import Evaluator
from server_node.half import ServerHalf
from server_node.journal import JOURNAL_FILE, Header
from server_node.ledger import Ledger
from server_node.run import Outbox, Run
from wire_protocol.manifest import GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE

CONFIG_FILE = "config.toml"
CONTROL_FOLDER = "control"
_VERSIONED = ("musplit", "torch", "numpy", "onnxruntime", "onnx", "paho-mqtt", "msgspec")


class Experiment(NamedTuple):
    """A prepared experiment: run it once with the client half learning, once with it frozen."""

    config: Config
    folder: Path
    exported: Export
    halves: Halves
    evaluator: Evaluator
    server_weights: NDArray[np.float32]
    server_weights_sha256: str
    blobs: list[bytes]  # manifest, graph, weights of the client bundle

    @property
    def manifest_bytes(self) -> bytes:
        """The client bundle's manifest as written."""
        return self.blobs[0]


def prepare(config: Config, folder: Path) -> Experiment:
    """Make the run folder: configuration as run, client and server halves. Raises InputErrors."""
    if any((place / JOURNAL_FILE).exists() for place in (folder, folder / CONTROL_FOLDER)):
        raise ConfigError(f"{folder}: holds a run already; give another --out, or remove it")
    if config.server.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("server.device: no CUDA device here; use --set server.device=cpu")
    torch.set_num_threads(config.server.threads)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    data = load_dataset(config.data.source, config.data.holdout)
    exported = export_model(
        config.model.name, config.model.cut, folder, seed=config.run.seed,
        input_shape=config.model.input_shape,
        arrays=[_sample_array(x, config.data.standardise) for x in data.x_train],
        weights=Path(config.model.weights) if config.model.weights else None,
    )  # fmt: skip
    server_manifest, server_weights = read_server_half(exported.server)
    blobs = [
        (exported.client / name).read_bytes() for name in (MANIFEST_FILE, GRAPH_FILE, WEIGHTS_FILE)
    ]
    evaluator = Evaluator(exported.halves.client, exported.manifest, data)
    return Experiment(
        config, folder, exported, exported.halves, evaluator, server_weights,
        server_manifest.weights.sha256, blobs,
    )  # fmt: skip


def _sample_array(x: NDArray[np.generic], standardise: str) -> SampleArray:
    return SampleArray(x.shape[1:], x.dtype.kind in "bui", fit_transform(x, standardise))


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
        environment=environment(),
    )  # fmt: skip
    client = np.frombuffer(
        experiment.blobs[2], "<f4", experiment.exported.manifest.parameters
    ).astype(np.float32)
    server = experiment.server_weights.copy()
    half = ServerHalf(
        experiment.halves.server.module, server, run_seed=config.run.seed, lam=config.method.lam,
        directions=config.method.directions_server, device=torch.device(config.server.device),
    )  # fmt: skip
    return Run(
        config, header, experiment.exported.manifest, half, experiment.evaluator, client, server,
        Ledger(folder, header, devices), outbox, notify,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """Versions and machine: part of a run's identity."""
    versions = {name: version(name) for name in _VERSIONED}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}
