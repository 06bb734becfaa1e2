"""Exported halves for the benchmarks: a session as devices use it, one with constant weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edge_client.bundle import Bundle, read_bundle
from edge_client.session import ClientSession
from export.exporter import export_model

MODELS: Final = Path(__file__).with_name("models.py")


class Case(NamedTuple):
    """A model of models.py, a sample's shape, and the batch it is measured with."""

    factory: str
    shape: tuple[int, ...]
    batch: int = 32


LENET: Final = Case("lenet", (1, 28, 28))
ALEXNET_2: Final = Case("alexnet2", (3, 32, 32))
ALEXNET: Final = Case("alexnet", (3, 32, 32))
TRANSFORMER: Final = Case("transformer", (128, 768), 8)
WIDE: Final = Case("wide", (4096,))
LINEAR_2K: Final = Case("linear_2k", (64,))
LINEAR_20K: Final = Case("linear_20k", (200,))


class Half(NamedTuple):
    """A client half ready to be timed on one thread."""

    session: ClientSession
    theta: NDArray[np.float32]
    x: NDArray[np.float32]  # (batch, *shape)
    forward_constant: Callable[[], NDArray[np.float32]]  # weights are constants of its graph


def open_half(case: Case) -> Half:
    """Export a model, open both sessions on it, and prove that they agree."""
    with tempfile.TemporaryDirectory(prefix="musplit-bench-") as folder:
        exported = export_model(
            f"{MODELS}:{case.factory}", "0", Path(folder), seed=0, input_shape=case.shape
        )
        bundle = read_bundle(exported.client)
        session = ClientSession(bundle, case.batch, threads=1)
        theta = bundle.initial_parameters()
        graph = constant_graph(bundle)
    shape = (case.batch, *case.shape)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    forward = _constant_session(graph, bundle, x)
    np.testing.assert_allclose(session.forward([x]), forward(), rtol=0, atol=1e-3)
    return Half(session, theta, x, forward)


def constant_graph(bundle: Bundle) -> bytes:
    """The bundle's graph with its weights as constants: what anyone would deploy."""
    model = onnx.load_from_string(bundle.graph)
    weights = np.empty(bundle.manifest.weights.size_bytes, np.uint8)
    bundle.read_weights(weights)
    for tensor in bundle.manifest.tensors:
        data = weights[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        array = data.view(tensor.dtype).reshape(tensor.shape)
        model.graph.initializer.append(numpy_helper.from_array(array, tensor.name))
    names = {tensor.name for tensor in bundle.manifest.tensors}
    inputs = [value for value in model.graph.input if value.name not in names]
    graph = helper.make_graph(
        list(model.graph.node), "constant", inputs, list(model.graph.output),
        list(model.graph.initializer),
    )  # fmt: skip
    plain = helper.make_model(graph, opset_imports=list(model.opset_import))
    plain.functions.extend(model.functions)
    plain.ir_version = model.ir_version
    serialised: bytes = plain.SerializeToString()
    return serialised


def _constant_session(
    graph: bytes, bundle: Bundle, x: NDArray[np.float32]
) -> Callable[[], NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    output = np.empty((len(x), *bundle.manifest.activation.shape), np.float32)
    binding = session.io_binding()
    name = bundle.manifest.inputs[0].name
    binding.bind_input(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output(
        bundle.manifest.activation.name, "cpu", 0, np.float32, output.shape, output.ctypes.data
    )

    def forward() -> NDArray[np.float32]:
        session.run_with_iobinding(binding)
        return output  # which keeps alive what is bound by its address

    return forward
