"""A first-order warm-up at the server on public samples: start weights for model.weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from export.inputs import SampleArray, input_specs
from export.models import BuiltModel, build_model
from export.start_weights import load_start_weights
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError, DataError
from server_node.machine import fix_arithmetic
from server_node.transform import sample_arrays
from wire_protocol.manifest import prepare_inputs

_ROWS: Final = 1024
_UNLIMITED: Final = [None] * 8

Arrays = list[NDArray[Any]]


class Warmup(NamedTuple):
    """What a warm-up came to; accuracies before and after, on all samples of each set."""

    weights: Path
    public_samples: int
    steps: int
    public_accuracy: tuple[float, float]
    test_accuracy: tuple[float, float]


def warm_up(
    config: Config, out: Path, *, epochs: int, steps: int | None, eta: float, batch: int,
    notify: Callable[[int, int], None],
) -> Warmup:  # fmt: skip
    """Train the whole model by Adam on the public samples and write OUT, a safetensors file.

    Starts from model.weights, or from run.seed, and is a function of the configuration and the
    arguments: repeated on the same machine it gives the same bits. The test samples are the
    devices', shifted where data.shift says so. `notify` is told the steps done and planned.
    BatchNorm gathers its statistics here. Raises ConfigError without public samples, ModelError.
    """
    fix_arithmetic(config.server)
    data = load_dataset(config.data)
    if not data.x_public:
        raise ConfigError(
            "data.public: a warm-up needs public samples; set it or data.public_source"
        )
    arrays = sample_arrays(config.data, data)
    model = build_model(config.model.name, config.run.seed, config.model.input_shape, arrays)
    if config.model.weights:
        load_start_weights(model, Path(config.model.weights))
    public = _prepared(model, arrays, list(data.x_public))
    test = _prepared(model, arrays, data.x_test)
    public_before = _accuracy(model, public, data.y_public)
    test_before = _accuracy(model, test, data.y_test)
    total = steps or epochs * -(-len(data.y_public) // batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        _train(model.module.train(), public, data.y_public, total, eta, batch, notify)
    model.module.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Tied tensors are written once each: a safetensors file holds no aliases.
    state = model.module.state_dict()
    save_file({name: t.detach().clone().contiguous() for name, t in state.items()}, out)
    return Warmup(
        out, len(data.y_public), total,
        (public_before, _accuracy(model, public, data.y_public)),
        (test_before, _accuracy(model, test, data.y_test)),
    )  # fmt: skip


def _prepared(model: BuiltModel, arrays: list[SampleArray], xs: Arrays) -> Arrays:
    specs = input_specs(model.inputs, arrays, _UNLIMITED[: len(arrays)])
    return prepare_inputs(xs, specs)


def _train(
    module: nn.Module, xs: Arrays, y: NDArray[np.int64], steps: int, eta: float, batch: int,
    notify: Callable[[int, int], None],
) -> None:  # fmt: skip
    optimiser = torch.optim.Adam(module.parameters(), lr=eta)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if not len(order):
            order = torch.randperm(len(y))
        chosen, order = order[:batch].numpy(), order[batch:]
        optimiser.zero_grad()
        scores = module(*(torch.from_numpy(x[chosen]) for x in xs))
        loss = functional.cross_entropy(scores, torch.from_numpy(y[chosen]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        notify(step + 1, steps)


def _accuracy(model: BuiltModel, xs: Arrays, y: NDArray[np.int64]) -> float:
    right = 0
    with torch.inference_mode():
        for first in range(0, len(y), _ROWS):
            part = slice(first, first + _ROWS)
            scores = model.module(*(torch.from_numpy(x[part]) for x in xs))
            if int(y.max()) >= scores.shape[1]:
                raise DataError(f"label {int(y.max())}: model {model.name} has too few classes")
            right += int((scores.argmax(1).numpy() == y[part]).sum())
    return right / len(y)
