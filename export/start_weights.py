"""Weights to start from: a safetensors file with the model's own tensor names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from export.errors import ModelError
from export.models import BuiltModel
from wire_protocol.manifest import sha256


def load_start_weights(model: BuiltModel, path: Path) -> str:
    """Fill the model from a file that holds its tensors and no others; returns the file's digest.

    A tied parameter may be there by any one of its names, or by several with equal values. A
    buffer that counts batches (BatchNorm's num_batches_tracked) may be missing. Raises ModelError.
    """
    try:
        data = path.read_bytes()
        tensors = load(data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except SafetensorError as error:
        raise ModelError(f"{path}: not a safetensors file ({error})") from error
    state = model.module.state_dict()
    for name, tensor in tensors.items():
        _check(path, model.name, name, tensor, state.get(name))
    filled = {state[name].data_ptr() for name in tensors}
    missing = [
        name
        for name, tensor in state.items()
        if tensor.data_ptr() not in filled and not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise ModelError(
            f"{path}: lacks tensor {missing[0]} of model {model.name} ({len(missing)} missing)"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    for name, tensor in tensors.items():
        if not torch.equal(state[name], tensor):
            raise ModelError(f"{path}: tensor {name} is tied to another that has other values")
    return sha256(data)


def _check(
    path: Path, model: str, name: str, tensor: torch.Tensor, wanted: torch.Tensor | None
) -> None:
    if wanted is None:
        raise ModelError(f"{path}: tensor {name} is none of model {model}'s")
    if tensor.shape != wanted.shape:
        raise ModelError(
            f"{path}: tensor {name} has shape {tuple(tensor.shape)}, model {model} has "
            f"{tuple(wanted.shape)}"
        )
    if tensor.dtype != wanted.dtype:
        raise ModelError(
            f"{path}: tensor {name} is {tensor.dtype}, model {model} has {wanted.dtype}"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ModelError(f"{path}: tensor {name} holds values that are not finite")
