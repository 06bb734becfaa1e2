"""The client half as an ONNX graph whose every parameter and buffer is a named input.

A plain export folds BatchNorm into convolutions and merges equal initializers, which a perturbed
weight must not meet; torch.func.functional_call turns the state into arguments instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from export.cuts import Half
from export.errors import ModelError, ParityError, first_line
from export.inputs import draw, example
from export.tracing import quiet
from wire_protocol.manifest import InputSpec

OPSET: Final = 20
OUTPUT_NAME: Final = "activation"
MAX_RELATIVE_ERROR: Final = 1e-5
_PARITY_BATCHES: Final = (2, 5)
# Large against any lam, small enough that activations keep their scale.
_PARITY_PERTURBATION: Final = 0.05
# What a weights.bin holds; a buffer of another type (a mask) stays in the graph as a constant.
_STORED: Final = (torch.float32, torch.int64)


class _Functional(nn.Module):
    """half(*xs) with the half's state as an argument; the half is hidden from the module tree."""

    def __init__(self, half: nn.Module) -> None:
        super().__init__()
        self.__dict__["_half"] = half

    def forward(self, state: dict[str, torch.Tensor], *xs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(self.__dict__["_half"], state, xs)
        return result


def half_state(half: Half) -> dict[str, torch.Tensor]:
    """Parameters, then buffers, by their names in the half; detached."""
    buffers = ((n, t) for n, t in half.module.named_buffers() if t.dtype in _STORED)
    return {name: t.detach() for name, t in (*half.module.named_parameters(), *buffers)}


def export_graph(half: Half, inputs: Sequence[InputSpec]) -> bytes:
    """ONNX bytes of a half; batch is dynamic. Raises ModelError when torch cannot trace it."""
    state = half_state(half)
    names = {**half.parameter_names, **half.buffer_names}
    batch = {0: torch.export.Dim("batch")}
    return to_onnx(
        _Functional(half.module).eval(), (state, *example(inputs, 2)),
        [*(names[name] for name in state), *(spec.name for spec in inputs)], OUTPUT_NAME,
        {"state": {name: {} for name in state}, "xs": tuple(batch for _ in inputs)},
    )  # fmt: skip


def to_onnx(
    module: nn.Module, arguments: tuple[Any, ...], inputs: list[str], output: str,
    dynamic_shapes: dict[str, Any],
) -> bytes:  # fmt: skip
    """A module with one output as an ONNX model. Raises ModelError."""
    try:
        with quiet():
            program = torch.onnx.export(
                module, arguments, dynamo=True, verbose=False, opset_version=OPSET,
                input_names=inputs, output_names=[output], dynamic_shapes=dynamic_shapes,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise ModelError(f"cannot be exported to ONNX: {first_line(cause)}") from error
    assert program is not None  # dynamo=True without a file returns the program
    proto = program.model_proto
    _strip(proto)
    return bytes(proto.SerializeToString())


def _strip(proto: Any) -> None:
    """Take out what torch notes of its tracing: paths and counters, different in each export."""
    del proto.metadata_props[:]
    graphs = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        del graph.metadata_props[:]
        for held in (*graph.node, *graph.value_info, *getattr(graph, "initializer", ())):
            del held.metadata_props[:]
            held.doc_string = ""
        for value in (*graph.input, *graph.output) if graph is proto.graph else ():
            del value.metadata_props[:]
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]


def check_parity(graph: bytes, half: Half, inputs: Sequence[InputSpec], seed: int) -> float:
    """Largest relative error of the graph against torch, with perturbed weights, two batches.

    Relative to the largest activation. Raises ParityError above MAX_RELATIVE_ERROR.
    """
    random = np.random.default_rng(seed)
    session = ort_session(graph)
    names = {**half.parameter_names, **half.buffer_names}
    worst = 0.0
    for batch in _PARITY_BATCHES:
        state = half_state(half)
        for name in half.parameter_names:
            noise = random.standard_normal(tuple(state[name].shape)) * _PARITY_PERTURBATION
            state[name] = state[name] + torch.from_numpy(noise.astype(np.float32))
        xs = draw(inputs, batch, random)
        with torch.no_grad():
            tensors = tuple(torch.from_numpy(x) for x in xs)
            want = torch.func.functional_call(half.module, state, tensors).numpy()
        feeds = {names[name]: tensor.numpy() for name, tensor in state.items()}
        feeds |= {spec.name: x for spec, x in zip(inputs, xs, strict=True)}
        worst = max(worst, relative_error(session.run([OUTPUT_NAME], feeds)[0], want))
    if not worst <= MAX_RELATIVE_ERROR:
        raise ParityError(
            f"the exported graph differs from torch by {worst:.1e} (allowed {MAX_RELATIVE_ERROR}); "
            "a layer of the client half does not export faithfully"
        )
    return worst


def ort_session(graph: bytes) -> ort.InferenceSession:
    """ONNX Runtime on one thread of the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def relative_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Largest difference, relative to the largest magnitude of `want`."""
    return float(np.abs(got - want).max()) / max(float(np.abs(want).max()), 1e-12)
