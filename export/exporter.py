"""`export_model`: build, cut, write both folders, prove the graph, load back what was written."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import torch

from export.cuts import Half, Halves, cut_model
from export.errors import ModelError
from export.graph import (
    INPUT_NAME,
    OPSET,
    OUTPUT_NAME,
    check_parity,
    export_graph,
    half_state,
)
from export.server_half import (
    MODEL_FILE,
    ServerManifest,
    read_server_half,
    write_server_half,
)
from export.zoo import BuiltModel, build_model
from wire_protocol.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    ActivationSpec,
    Blob,
    InputSpec,
    Manifest,
    TensorSpec,
    Transform,
    sha256,
)

CLIENT_FOLDER: Final = "client"
SERVER_FOLDER: Final = "server"


class Export(NamedTuple):
    """What an export produced."""

    client: Path
    server: Path
    digest: str
    manifest: Manifest
    server_parameters: int


def export_model(
    name: str,
    cut: str,
    out: Path,
    *,
    seed: int,
    input_shape: tuple[int, ...] | None = None,
    raw_shape: tuple[int, ...] | None = None,
    transform: Transform | None = None,
) -> Export:
    """Write OUT/client and OUT/server. Raises ModelError, CutError or ParityError.

    `transform` makes of raw samples of `raw_shape` what the model takes; none: they are the same.
    """
    model = build_model(name, seed, input_shape)
    halves = cut_model(model, cut)
    graph = export_graph(halves.client, model.input_shape)
    parity = check_parity(graph, halves.client, model.input_shape, seed)
    weights, tensors = _pack(halves.client)
    raw = raw_shape or model.input_shape
    manifest = _client_manifest(
        model, cut, halves, graph, weights, tensors, raw, transform, parity
    )  # fmt: skip
    client, server = out / CLIENT_FOLDER, out / SERVER_FOLDER
    client.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(manifest))
    (client / GRAPH_FILE).write_bytes(graph)
    (client / WEIGHTS_FILE).write_bytes(weights)
    (client / MANIFEST_FILE).write_bytes(data)
    server_weights, server_tensors = _pack(halves.server)
    source = model.source.read_bytes() if model.source is not None else None
    server_manifest = ServerManifest(
        format="musplit-server-half/1", model=name, cut=cut, seed=seed,
        input_shape=list(model.input_shape), parameters=_parameter_count(server_tensors),
        weights=_blob(server_weights), model_file_sha256=sha256(source) if source else "",
    )  # fmt: skip
    write_server_half(server, server_manifest, server_weights, source)
    load_halves(server)  # a copied model file must build the model on its own
    return Export(client, server, sha256(data), manifest, server_manifest.parameters)


def load_halves(folder: Path) -> Halves:
    """Both torch halves of an exported server folder, server weights as exported.

    Raises HalfError, ModelError or CutError.
    """
    manifest, _ = read_server_half(folder)
    name = manifest.model
    if manifest.model_file_sha256:
        name = f"{folder / MODEL_FILE}:{name.rpartition(':')[2]}"
    model = build_model(name, manifest.seed, tuple(manifest.input_shape))
    halves = cut_model(model, manifest.cut)
    if sum(p.numel() for p in halves.server.module.parameters()) != manifest.parameters:
        raise ModelError(f"{folder}: the model has another number of parameters than was exported")
    fill_half(halves.server, (folder / WEIGHTS_FILE).read_bytes())
    return halves


def fill_half(half: Half, weights: bytes) -> None:
    """Load a weights.bin into a half: parameters and buffers, in the order they were packed."""
    offset = 0
    with torch.no_grad():
        for tensor in half_state(half).values():
            flat = np.frombuffer(weights, str(tensor.numpy().dtype), tensor.numel(), offset)
            tensor.copy_(torch.from_numpy(flat.reshape(tuple(tensor.shape)).copy()))
            offset += flat.nbytes


def _client_manifest(
    model: BuiltModel, cut: str, halves: Halves, graph: bytes, weights: bytes,
    tensors: list[TensorSpec], raw_shape: tuple[int, ...], transform: Transform | None,
    parity: float,
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
        inputs=[
            InputSpec(
                INPUT_NAME,
                list(raw_shape),
                list(model.input_shape),
                "float32",
                transform or Transform(),
            )
        ],
        activation=ActivationSpec(OUTPUT_NAME, list(halves.activation_shape), "float32"),
        parity_max_relative_error=parity,
        versions={name: version(name) for name in ("musplit", "torch", "onnx", "onnxruntime")},
    )


def _pack(half: Half) -> tuple[bytes, list[TensorSpec]]:
    """Parameters then buffers as bytes, and where each lies. Raises ModelError."""
    names = {**half.parameter_names, **half.buffer_names}
    parts: list[bytes] = []
    specs: list[TensorSpec] = []
    offset = 0
    for name, tensor in half_state(half).items():
        array = np.ascontiguousarray(tensor.numpy())
        kind = "parameter" if name in half.parameter_names else "buffer"
        dtype = str(array.dtype)
        if dtype not in ("float32", "int64") or (kind == "parameter" and dtype != "float32"):
            raise ModelError(f"{kind} {names[name]} is {dtype}: parameters must be float32")
        data = array.tobytes()
        specs.append(
            msgspec.convert(
                {"name": names[name], "shape": list(array.shape), "dtype": dtype,
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
