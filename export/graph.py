"""The client half as an ONNX graph whose every parameter and buffer is a named input.

A plain export folds BatchNorm into convolutions and merges equal initializers, which a perturbed
weight must not meet; torch.func.functional_call turns the state into arguments instead.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from export.cuts import Half
from export.errors import ModelError, ParityError
from export.zoo import first_line

OPSET: Final = 20
INPUT_NAME: Final = "input"
OUTPUT_NAME: Final = "activation"
MAX_RELATIVE_ERROR: Final = 1e-5
_PARITY_BATCHES: Final = (2, 5)
# Large against any lam, small enough that activations keep their scale.
_PARITY_PERTURBATION: Final = 0.05


class _Functional(nn.Module):
    """half(x) with the half's state as an argument; the half is hidden from the module tree."""

    def __init__(self, half: nn.Module) -> None:
        super().__init__()
        self.__dict__["_half"] = half

    def forward(self, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(self.__dict__["_half"], state, (x,))
        return result


def half_state(half: Half) -> dict[str, torch.Tensor]:
    """Parameters, then buffers, by their names in the half; detached."""
    named = [*half.module.named_parameters(), *half.module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def export_graph(half: Half, input_shape: tuple[int, ...]) -> bytes:
    """ONNX bytes of a half; batch is dynamic. Raises ModelError when torch cannot trace it."""
    state = half_state(half)
    names = {**half.parameter_names, **half.buffer_names}
    try:
        with _quiet():
            program = torch.onnx.export(
                # A copy: tracing leaves its own tensors in a layer that is used twice.
                _Functional(copy.deepcopy(half.module)).eval(),
                (state, torch.zeros(2, *input_shape)),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[*(names[name] for name in state), INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes={
                    "state": {name: {} for name in state},
                    "x": {0: torch.export.Dim("batch")},
                },
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise ModelError(
            f"the client half cannot be exported to ONNX: {first_line(cause)}"
        ) from error
    assert program is not None  # dynamo=True without a file returns the program
    return bytes(program.model_proto.SerializeToString())


def check_parity(graph: bytes, half: Half, input_shape: tuple[int, ...], seed: int) -> float:
    """Largest relative error of the graph against torch, with perturbed weights, two batches.

    Relative to the largest activation. Raises ParityError above MAX_RELATIVE_ERROR.
    """
    random = np.random.default_rng(seed)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = {**half.parameter_names, **half.buffer_names}
    worst = 0.0
    for batch in _PARITY_BATCHES:
        state = half_state(half)
        for name in half.parameter_names:
            noise = random.standard_normal(tuple(state[name].shape)) * _PARITY_PERTURBATION
            state[name] = state[name] + torch.from_numpy(noise.astype(np.float32))
        x = torch.from_numpy(random.standard_normal((batch, *input_shape)).astype(np.float32))
        with torch.no_grad():
            want = torch.func.functional_call(half.module, state, (x,)).numpy()
        feeds = {names[name]: tensor.numpy() for name, tensor in state.items()}
        got = session.run([OUTPUT_NAME], {**feeds, INPUT_NAME: x.numpy()})[0]
        scale = max(float(np.abs(want).max()), 1e-12)
        worst = max(worst, float(np.abs(got - want).max()) / scale)
    if not worst <= MAX_RELATIVE_ERROR:
        raise ParityError(
            f"the exported graph differs from torch by {worst:.1e} (allowed {MAX_RELATIVE_ERROR}); "
            "a layer of the client half does not export faithfully"
        )
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporter warns about packages that are not needed here (torchvision)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
