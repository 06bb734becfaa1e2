"""What a run needs before any device joins: data, exported halves, and the open run folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from export.client_half import ClientHalf, read_client_half
from export.cuts import Halves
from export.errors import HalfError
from export.exporter import (
    Export,
    export_model,
    fill_half,
    load_halves,
)
from export.server_half import read_server_half
from server_node.actions import Work
from server_node.config import Config, to_toml
from server_node.datasets import load_dataset
from server_node.evaluation import Evaluator
from server_node.files import CONFIG_FILE, CONTROL_FOLDER, replace_file
from server_node.first_half import FirstHalf
from server_node.half import ServerHalf
from server_node.journal import Header, Resumed
from server_node.ledger import Ledger
from server_node.machine import environment, fix_arithmetic
from server_node.optimisers import OptimiserRule, check_optimiser
from server_node.outbox import Outbox
from server_node.resume import History, Past, check_identity
from server_node.run import Run
from server_node.samples import Dataset
from server_node.transform import Declared, check_fit, explained, sample_arrays
from wire_protocol.manifest import CLIENT_FOLDER, SERVER_FOLDER


class Experiment(NamedTuple):
    """A prepared experiment: run it once with the client half learning, once with it frozen."""

    config: Config
    folder: Path
    exported: Export
    evaluator: Evaluator
    server_weights: NDArray[np.float32]
    server_weights_sha256: str
    client: ClientHalf
    class_names: tuple[str, ...]  # by class number; empty: the data has only numbers
    data_notes: tuple[str, ...]  # what was made of the data's source

    @property
    def no_control(self) -> str:
        """Why no frozen-client control is run; empty when one is."""
        if not self.exported.manifest.parameters:
            return "the device trains nothing (model.perturb): this run is the frozen client"
        return "" if self.config.evaluation.control else "evaluation.control is off"


def prepare(
    config: Config, folder: Path, past: Past | None = None, data: Dataset | None = None
) -> Experiment:
    """Make the run folder: configuration as run, client and server halves. Raises InputErrors.

    `data` is the configuration's data set, for who has loaded it already.

    A run that goes on needs the halves of its `past`: they are exported again when they are
    damaged. Raises JournalError when they, or the configuration, are not those it began with.
    """
    fix_arithmetic(config.server)
    if config.method.server_order == "first":
        check_optimiser(_rule(config))
    folder.mkdir(parents=True, exist_ok=True)
    if past is None:
        toml = to_toml(config).encode()
        replace_file(folder / CONFIG_FILE, lambda file: file.write(toml))
    data = load_dataset(config.data) if data is None else data
    exported = _kept_export(config, folder, past.header) if past is not None else None
    if exported is None:
        exported = _export(config, data, folder)
    server_manifest, server_weights = read_server_half(exported.server)
    if past is not None:
        check_identity(past, config.sha256(), exported.digest, server_manifest.weights.sha256)
    evaluator = Evaluator(exported.halves.client, exported.manifest, data)
    return Experiment(
        config, folder, exported, evaluator, server_weights,
        server_manifest.weights.sha256, read_client_half(exported.client), data.class_names,
        data.notes,
    )  # fmt: skip


def open_run(
    experiment: Experiment, *, frozen: bool, devices: list[tuple[int, str]], outbox: Outbox,
    notify: Callable[[dict[str, Any]], None], history: History | None = None,
    read_clock_s: Callable[[], float] = time.monotonic,
    spend: Callable[[Sequence[Work]], None] | None = None,
) -> Run:  # fmt: skip
    """Open the journal and the files of a run; `frozen` is the control with eta_c = 0.

    With a `history` the run goes on in its folder, with its devices. With `spend` its clock is
    virtual (see Run).
    """
    config = control_config(experiment.config) if frozen else experiment.config
    folder = experiment.folder / CONTROL_FOLDER if frozen else experiment.folder
    folder.mkdir(exist_ok=True)
    half = open_half(experiment)
    if history is not None:
        header = history.past.header
        resumed = Resumed(
            len(history.commits), config.server.device, config.server.threads,
            config.server.replicas, environment(),
        )  # fmt: skip
        ledger = Ledger.resume(history.past, config.method.tau, resumed)
    else:
        first = config.method.server_order == "first"
        header = Header(
            run=secrets.randbits(63), run_seed=config.run.seed, lam=config.method.lam,
            manifest_sha256=experiment.exported.digest,
            server_weights_sha256=experiment.server_weights_sha256,
            config_sha256=config.sha256(), server_device=config.server.device,
            server_threads=config.server.threads, server_replicas=config.server.replicas,
            environment=environment(), client_optimiser=config.method.client_optimiser,
            momentum=config.method.momentum, beta2=config.method.beta2,
            server_order=config.method.server_order,
            server_optimiser=config.method.server_optimiser if first else "",
            server_options=config.method.server_options,
        )  # fmt: skip
        ledger = Ledger.begin(folder, header, devices, virtual=spend is not None)
    return Run(
        config, header, experiment.exported.manifest, half, experiment.evaluator,
        experiment.client.initial_parameters(), experiment.server_weights, ledger, outbox, notify,
        history, read_clock_s, spend,
    )  # fmt: skip


def control_config(config: Config) -> Config:
    """The frozen-client control's configuration: the same with eta_c = 0."""
    method = msgspec.structs.replace(config.method, eta_c=0.0)
    return msgspec.structs.replace(config, method=method)


def open_half(experiment: Experiment) -> ServerHalf | FirstHalf:
    """The server half in torch, with its initial weights. Raises ConfigError."""
    config, halves = experiment.config, experiment.exported.halves
    if config.method.server_order == "first":
        return FirstHalf(
            halves.server.module, experiment.server_weights, rule=_rule(config),
            device=torch.device(config.server.device),
        )  # fmt: skip
    return _server_half(config, halves, experiment.server_weights)


def _rule(config: Config) -> OptimiserRule:
    return OptimiserRule(config.method.server_optimiser, config.method.server_options)


def _server_half(config: Config, halves: Halves, weights: NDArray[np.float32]) -> ServerHalf:
    return ServerHalf(
        halves.server.module, weights, run_seed=config.run.seed, lam=config.method.lam,
        directions=config.method.directions_server, device=torch.device(config.server.device),
        replicas=config.server.replicas,
    )  # fmt: skip


def _export(config: Config, data: Dataset, folder: Path) -> Export:
    """Export the model for the data; prove that its server half can compute in batches."""
    arrays = sample_arrays(config.data, data)
    first = Declared(arrays[0].raw_shape, arrays[0].shape, arrays[0].transform)
    with explained(config, first):
        exported = export_model(
            config.model.name, config.model.cut, folder, seed=config.run.seed,
            input_shape=config.model.input_shape, arrays=arrays,
            weights=Path(config.model.weights) if config.model.weights else None,
            perturb=config.model.perturb,
        )  # fmt: skip
    check_fit(config, first, exported.manifest.inputs[0].shape)
    if config.server.replicas > 1:
        _, server_weights = read_server_half(exported.server)
        shape = (config.devices.batch, *exported.manifest.activation.shape)
        _server_half(config, exported.halves, server_weights).check_batching(shape)
    return exported


def _kept_export(config: Config, folder: Path, header: Header) -> Export | None:
    """The halves in a run folder when they are whole and those of the journal, otherwise None."""
    client, server = folder / CLIENT_FOLDER, folder / SERVER_FOLDER
    try:
        bundle = read_client_half(client)
        manifest, _ = read_server_half(server)
    except HalfError:
        return None
    have = bundle.digest, manifest.weights.sha256, manifest.model, manifest.cut
    model = config.model
    if have != (header.manifest_sha256, header.server_weights_sha256, model.name, model.cut):
        return None
    halves = load_halves(server)
    fill_half(halves.client, bundle.weights)
    return Export(
        client, server, bundle.digest, bundle.manifest, manifest.parameters, halves, []
    )  # fmt: skip
