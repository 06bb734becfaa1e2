"""`export_model`: build, trace, cut, prove both halves and the graph, write both folders."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import torch
from torch import nn

from export.cuts import Half, Halves
from export.errors import ModelError, ParityError
from export.graph import (
    OPSET,
    OUTPUT_NAME,
    check_parity,
    export_graph,
    half_state,
    relative_error,
)
from export.inputs import Declared, SampleArray, draw, input_specs
from export.models import BuiltModel, build_model
from export.perturb import cut_and_choose
from export.server_half import (
    MODEL_FILE,
    ServerManifest,
    read_server_half,
    write_server_half,
)
from export.start_weights import load_start_weights
from export.tracing import index_limits, plain_attention
from wire_protocol.manifest import (
    CLIENT_FOLDER,
    GRAPH_FILE,
    MANIFEST_FILE,
    SERVER_FOLDER,
    WEIGHTS_FILE,
    ActivationSpec,
    Blob,
    InputSpec,
    Manifest,
    TensorSpec,
    sha256,
)

_PROOF_BATCH: Final = 3
# Between batches of different sizes kernels differ; a model that mixes samples differs by far more.
_MIXING: Final = 1e-3


class Export(NamedTuple):
    """What an export produced."""

    client: Path
    server: Path
    digest: str
    manifest: Manifest
    server_parameters: int
    halves: Halves
    notes: list[str]  # what was frozen or switched off


def export_model(
    name: str,
    cut: str,
    out: Path,
    *,
    seed: int,
    input_shape: Declared = None,
    arrays: Sequence[SampleArray] = (),
    weights: Path | None = None,
    perturb: Sequence[str] = (),
) -> Export:
    """Write OUT/client and OUT/server. Raises ModelError, CutError or ParityError.

    `input_shape` is what the user says of the inputs, `arrays` what the data holds; see
    export/inputs.py. `weights` is a safetensors file to start from, `perturb` what the device
    trains of its half (export/perturb.py).
    """
    model = build_model(name, seed, input_shape, arrays)
    start = load_start_weights(model, weights) if weights is not None else ""
    traced, halves = cut_and_choose(model, cut, perturb, seed)
    inputs = input_specs(model.inputs, arrays, index_limits(traced))
    _prove(model, halves, inputs, seed)
    graph = export_graph(halves.client, inputs)
    parity = check_parity(graph, halves.client, inputs, seed)
    client_weights, tensors = _pack(halves.client)
    manifest = _client_manifest(model, cut, halves, graph, client_weights, tensors, inputs, parity)
    client, server = out / CLIENT_FOLDER, out / SERVER_FOLDER
    client.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(manifest))
    (client / GRAPH_FILE).write_bytes(graph)
    (client / WEIGHTS_FILE).write_bytes(client_weights)
    (client / MANIFEST_FILE).write_bytes(data)
    server_weights, server_tensors = _pack(halves.server)
    server_manifest = ServerManifest(
        format="musplit-server-half/1", model=name, cut=cut, seed=seed, inputs=list(model.inputs),
        parameters=_parameter_count(server_tensors), weights=_blob(server_weights),
        model_file_sha256=sha256(model.source) if model.source is not None else "",
        start_weights_sha256=start, perturb=list(perturb),
    )  # fmt: skip
    write_server_half(server, server_manifest, server_weights, model.source)
    return Export(
        client, server, sha256(data), manifest, server_manifest.parameters, halves,
        [*frozen_notes(model.module), *_choice_notes(manifest)],
    )  # fmt: skip


def load_halves(folder: Path) -> Halves:
    """Both torch halves of an exported server folder, server weights as exported.

    Raises HalfError, ModelError or CutError.
    """
    manifest, _ = read_server_half(folder)
    _, halves = cut_and_choose(
        load_model(folder), manifest.cut, manifest.perturb, manifest.seed
    )  # fmt: skip
    if sum(p.numel() for p in halves.server.module.parameters()) != manifest.parameters:
        raise ModelError(f"{folder}: the model has another number of parameters than was exported")
    fill_half(halves.server, (folder / WEIGHTS_FILE).read_bytes())
    return halves


def load_model(folder: Path) -> BuiltModel:
    """The whole model of an exported server folder, weights as at its seed.

    Raises HalfError, ModelError.
    """
    manifest, _ = read_server_half(folder)
    name = manifest.model
    if manifest.model_file_sha256:
        name = f"{folder / MODEL_FILE}:{name.rpartition(':')[2]}"
    declared = [
        ("int:" if i.dtype == "int64" else "") + ",".join(map(str, i.shape))
        for i in manifest.inputs
    ]
    return build_model(name, manifest.seed, declared)


def frozen_notes(module: nn.Module) -> list[str]:
    """What the halves do not do that training in one place does, one line each."""
    layers = [*module.modules()]
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in layers)  # noqa: SLF001
    dropouts = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in layers)  # noqa: SLF001
    notes = []
    if norms:
        notes.append(
            f"{norms} BatchNorm layers: their statistics are frozen, in both halves; start from "
            "trained ones (safetensors) or use GroupNorm"
        )
    if dropouts:
        notes.append(f"{dropouts} dropout layers: off in both halves")
    return notes


def _choice_notes(manifest: Manifest) -> list[str]:
    """What `perturb` leaves out, if anything."""
    if not manifest.frozen:
        return []
    if not manifest.parameters:
        return [f"frozen client: the device trains none of its {manifest.frozen} parameters"]
    trained, frozen = manifest.parameters, manifest.frozen
    return [f"the device trains {trained} parameters of its half, {frozen} are frozen"]


def _frozen(model: BuiltModel, tensors: list[TensorSpec]) -> int:
    """Elements of the model's parameters that lie among the client's constants."""
    trained = {name for name, _ in model.module.named_parameters()}
    frozen = (t for t in tensors if t.kind == "buffer" and t.name in trained)
    return sum(t.size_bytes // 4 for t in frozen)


def fill_half(half: Half, weights: bytes) -> None:
    """Load a weights.bin into a half: parameters and buffers, in the order they were packed."""
    offset = 0
    with torch.no_grad():
        for tensor in half_state(half).values():
            flat = np.frombuffer(weights, str(tensor.numpy().dtype), tensor.numel(), offset)
            tensor.copy_(torch.from_numpy(flat.reshape(tuple(tensor.shape)).copy()))
            offset += flat.nbytes


def _prove(model: BuiltModel, halves: Halves, inputs: Sequence[InputSpec], seed: int) -> None:
    """The halves together are the model, and a sample's result is its own. Raises ParityError."""
    xs = [torch.from_numpy(x) for x in draw(inputs, _PROOF_BATCH, np.random.default_rng(seed))]
    with torch.no_grad(), plain_attention():
        want = model.module(*xs).numpy()
        got = halves.server.module(halves.client.module(*xs)).numpy()
        alone = model.module(*(x[:1] for x in xs)).numpy()
    if not relative_error(got, want) <= 1e-6:
        raise ParityError(
            f"model {model.name}: its halves differ from it by {relative_error(got, want):.1e}; "
            "its forward does not compute the same each time"
        )
    if not relative_error(alone, want[:1]) <= _MIXING:
        raise ModelError(
            f"model {model.name}: a sample's result depends on the other samples of its batch; a "
            "half must compute each sample alone"
        )


def _client_manifest(
    model: BuiltModel, cut: str, halves: Halves, graph: bytes, weights: bytes,
    tensors: list[TensorSpec], inputs: list[InputSpec], parity: float,
) -> Manifest:  # fmt: skip
    return Manifest(
        format="musplit-bundle/1",
        model=model.name,
        cut=cut,
        classes=halves.classes,
        opset=OPSET,
        graph=_blob(graph),
        weights=_blob(weights),
        parameters=_parameter_count(tensors),
        tensors=tensors,
        inputs=inputs,
        activation=ActivationSpec(OUTPUT_NAME, list(halves.activation_shape), "float32"),
        parity_max_relative_error=parity,
        versions={name: version(name) for name in ("musplit", "torch", "onnx", "onnxruntime")},
        frozen=_frozen(model, tensors),
    )


def _pack(half: Half) -> tuple[bytes, list[TensorSpec]]:
    """Parameters then buffers as bytes, and where each lies."""
    names = {**half.parameter_names, **half.buffer_names}
    parts: list[bytes] = []
    specs: list[TensorSpec] = []
    offset = 0
    for name, tensor in half_state(half).items():
        array = np.ascontiguousarray(tensor.numpy())
        kind = "parameter" if name in half.parameter_names else "buffer"
        data = array.tobytes()
        specs.append(
            msgspec.convert(
                {"name": names[name], "shape": list(array.shape), "dtype": str(array.dtype),
                 "offset_bytes": offset, "kind": kind},
                TensorSpec,
            )
        )  # fmt: skip
        parts.append(data)
        offset += len(data)
    return b"".join(parts), specs


def _blob(data: bytes) -> Blob:
    return Blob(sha256(data), len(data))


def _parameter_count(tensors: list[TensorSpec]) -> int:
    return sum(t.size_bytes // 4 for t in tensors if t.kind == "parameter")
