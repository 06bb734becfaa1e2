"""The trained model, out of the kit: one ONNX file, one safetensors file, and what they are.

model.onnx          the whole model with constant weights; its inputs are raw samples as the data
                    set holds them: the declared transforms are part of the graph
model.safetensors   parameters and buffers by the model's own names
model.json          inputs, classes, digests
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from export.adapters import merge_adapters
from export.client_half import ClientHalf
from export.cuts import Half, Halves
from export.errors import HalfError, ParityError
from export.exporter import fill_half, load_halves, load_model
from export.graph import MAX_RELATIVE_ERROR, ort_session, relative_error, to_onnx
from export.inputs import TORCH_DTYPES, draw
from export.tracing import plain_attention
from wire_protocol.manifest import InputSpec, prepare_inputs, sha256

ONNX_FILE: Final = "model.onnx"
STATE_FILE: Final = "model.safetensors"
FACTS_FILE: Final = "model.json"
OUTPUT_NAME: Final = "logits"
_PARITY_BATCHES: Final = (1, 7)

Vector = NDArray[np.float32]


class Trained(NamedTuple):
    """What was written, and how far the ONNX file is from the split pair."""

    onnx: Path
    state: Path
    facts: Path
    max_relative_error: float


class RawModel(nn.Module):
    """The model on raw samples: `wire_protocol.manifest.prepare_input` in torch, then the model."""

    def __init__(self, model: nn.Module, inputs: list[InputSpec]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        """xs[input] (batch, *raw shape) -> scores (batch, classes)."""
        prepared = (_prepare(x, spec) for x, spec in zip(xs, self.inputs, strict=True))
        scores: torch.Tensor = self.model(*prepared)
        return scores


def whole_state(
    server: Path, bundle: ClientHalf, client_weights: Vector, server_weights: Vector
) -> dict[str, torch.Tensor]:
    """The trained model's tensors by their own names, from both flat vectors (d_c,) and (d_s,).

    `server` is the folder of the server half, `bundle` its client half. A tensor that the model's
    forward never uses keeps its initial value. Raises HalfError, ModelError, CutError.
    """
    return _whole(server, _filled(server, bundle, client_weights, server_weights)).state_dict()


def export_trained(
    server: Path, bundle: ClientHalf, client_weights: Vector, server_weights: Vector, out: Path
) -> Trained:
    """Write OUT/model.onnx, model.safetensors and model.json; arguments as of `whole_state`.

    The ONNX file is run on random raw samples against the split pair. Raises HalfError,
    ModelError, CutError, and ParityError above 1e-5 of the largest score.
    """
    halves = _filled(server, bundle, client_weights, server_weights)
    module = _whole(server, halves)
    inputs = bundle.manifest.inputs
    with plain_attention():
        graph = to_onnx(
            RawModel(module, inputs).eval(),
            tuple(torch.zeros(2, *i.raw_shape, dtype=TORCH_DTYPES[i.dtype]) for i in inputs),
            [i.name for i in inputs], OUTPUT_NAME,
            {"xs": tuple({0: torch.export.Dim("batch")} for _ in inputs)},
        )  # fmt: skip
    worst = _parity(graph, halves, inputs)
    # Tied tensors are written once each: a safetensors file holds no aliases.
    state = save({name: t.detach().clone().contiguous() for name, t in module.state_dict().items()})
    out.mkdir(parents=True, exist_ok=True)
    result = Trained(out / ONNX_FILE, out / STATE_FILE, out / FACTS_FILE, worst)
    result.onnx.write_bytes(graph)
    result.state.write_bytes(state)
    facts = {
        "model": bundle.manifest.model, "cut": bundle.manifest.cut,
        "classes": bundle.manifest.classes, "inputs": inputs, "output": OUTPUT_NAME,
        "parity_max_relative_error": worst, "bundle_sha256": bundle.digest,
        "onnx_sha256": sha256(graph), "safetensors_sha256": sha256(state),
    }  # fmt: skip
    result.facts.write_bytes(msgspec.json.format(msgspec.json.encode(facts)))
    return result


def _filled(
    server: Path, bundle: ClientHalf, client_weights: Vector, server_weights: Vector
) -> Halves:
    halves = load_halves(server)
    fill_half(halves.client, bundle.weights)
    for half, weights in ((halves.client, client_weights), (halves.server, server_weights)):
        if sum(p.numel() for p in half.module.parameters()) != len(weights):
            raise HalfError(f"{server}: {len(weights)} weights are not those of this half")
        torch.nn.utils.vector_to_parameters(
            torch.from_numpy(weights.copy()), half.module.parameters()
        )
    return halves


def _whole(server: Path, halves: Halves) -> nn.Module:
    module = load_model(server).module
    own = module.state_dict(keep_vars=True)
    own |= dict(module.named_buffers())  # those that a state dict leaves out, too
    with torch.no_grad():
        for half in halves.client, halves.server:
            for name, tensor in _named(half).items():
                if name in own:  # adapters and constants of the forward have no name in the model
                    own[name].copy_(tensor)
            merge_adapters(own, _named(half))
    return module


def _named(half: Half) -> dict[str, torch.Tensor]:
    parameters, buffers = dict(half.module.named_parameters()), dict(half.module.named_buffers())
    return {name: parameters[own] for own, name in half.parameter_names.items()} | {
        name: buffers[own] for own, name in half.buffer_names.items()
    }


def _parity(graph: bytes, halves: Halves, inputs: list[InputSpec]) -> float:
    random = np.random.default_rng(0)
    session = ort_session(graph)
    worst = 0.0
    for batch in _PARITY_BATCHES:
        raw = [_raw(x, spec) for x, spec in zip(draw(inputs, batch, random), inputs, strict=True)]
        prepared = (torch.from_numpy(x) for x in prepare_inputs(raw, inputs))
        with torch.no_grad():
            want = halves.server.module(halves.client.module(*prepared)).numpy()
        feeds = {spec.name: x for spec, x in zip(inputs, raw, strict=True)}
        worst = max(worst, relative_error(session.run([OUTPUT_NAME], feeds)[0], want))
    if not worst <= MAX_RELATIVE_ERROR:
        raise ParityError(
            f"the trained model's ONNX file differs from the split pair by {worst:.1e} (allowed "
            f"{MAX_RELATIVE_ERROR})"
        )
    return worst


def _raw(x: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    """Raw samples that the transform brings to about the size of `x`."""
    if spec.dtype == "int64":
        return x.reshape(len(x), *spec.raw_shape)
    transform = spec.transform
    mean = float(np.mean(transform.mean)) if transform.mean else 0.0
    std = float(np.mean(transform.std)) if transform.std else 1.0
    noise = np.random.default_rng(x.size).standard_normal((len(x), *spec.raw_shape))
    return ((noise * transform.pool * std + mean) / (transform.scale or 1.0)).astype(np.float32)


def _prepare(x: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    if spec.dtype == "int64":
        return x.reshape(-1, *spec.shape)
    transform = spec.transform
    if transform.channels_last:
        x = x.movedim(-1, 1)
    if transform.pool > 1:
        pool = transform.pool
        *front, height, width = x.shape[1:]
        x = x.reshape(-1, *front, height // pool, pool, width // pool, pool).mean((-3, -1))
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    flat = flat * transform.scale
    mean, std = (torch.tensor(v or [d]) for v, d in ((transform.mean, 0.0), (transform.std, 1.0)))
    return ((flat - mean) / std).reshape(-1, *spec.shape)
