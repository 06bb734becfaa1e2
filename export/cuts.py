"""Cutting an nn.Sequential in two. Nested Sequentials are looked into; names are torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from export.errors import CutError, ModelError
from export.zoo import BuiltModel, first_line
from wire_protocol.frames import MAX_DIMS


class Half(NamedTuple):
    """One half: a module, and the whole model's name for each of its state tensors, in order."""

    module: nn.Sequential
    parameter_names: dict[str, str]  # name in the half -> name in the model
    buffer_names: dict[str, str]


class Halves(NamedTuple):
    """Both halves; shapes are without the batch dimension."""

    client: Half
    server: Half
    activation_shape: tuple[int, ...]
    classes: int


def cut_model(model: BuiltModel, cut: str) -> Halves:
    """Cut after the layer called `cut`. Raises CutError naming the legal cuts."""
    layers = list(_leaves(model.module, ""))
    inside = [i for i, (name, _) in enumerate(layers) if f"{name}.".startswith(f"{cut}.")]
    position = inside[-1] + 1 if inside else 0
    if not _both_trained(layers, position):
        why = "it leaves one half without parameters" if inside else "there is no such layer"
        raise CutError(
            f"model {model.name}: cannot be cut after {cut!r}: {why}; "
            f"legal cuts: {', '.join(legal_cuts(model))}"
        )
    client, server = _half(layers[:position]), _half(layers[position:])
    with torch.no_grad():
        try:
            activation = client.module(torch.zeros(2, *model.input_shape))
            output = server.module(activation)
        except Exception as error:  # the layers may be the user's own
            raise ModelError(
                f"model {model.name}: does not take samples of shape {model.input_shape}: "
                f"{first_line(error)}"
            ) from error
    shared = {id(p) for p in client.module.parameters()} & {
        id(p) for p in server.module.parameters()
    }
    if shared:
        raise CutError(
            f"model {model.name}: layers on both sides of {cut!r} share weights, which the halves "
            "would train apart; cut elsewhere"
        )
    if output.ndim != 2 or output.shape[1] < 2:
        raise ModelError(f"model {model.name}: the last layer must give one number per class")
    # A frame of differences adds the direction to the activation's dimensions.
    if activation.ndim + 1 > MAX_DIMS:
        raise CutError(
            f"model {model.name}: the tensor after {cut!r} has {activation.ndim} dimensions, "
            f"a frame carries {MAX_DIMS - 1}"
        )
    return Halves(client, server, tuple(activation.shape[1:]), int(output.shape[1]))


def legal_cuts(model: BuiltModel) -> list[str]:
    """Names after which both halves have parameters; the shortest name of each position."""
    layers = list(_leaves(model.module, ""))
    cuts: list[str] = []
    for position in range(1, len(layers)):
        parts = layers[position - 1][0].split(".")
        names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        following = layers[position][0]
        if _both_trained(layers, position):
            cuts.append(next(name for name in names if not following.startswith(f"{name}.")))
    return cuts


def _both_trained(layers: list[tuple[str, nn.Module]], position: int) -> bool:
    halves = (layers[:position], layers[position:])
    return all(any(True for _, layer in half for _ in layer.parameters()) for half in halves)


def _leaves(module: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # named_children() would pass over a layer that is used twice.
    for name, child in zip(module._modules, module, strict=True):  # noqa: SLF001
        if isinstance(child, nn.Sequential) and len(child):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _half(layers: list[tuple[str, nn.Module]]) -> Half:
    module = nn.Sequential(*(layer for _, layer in layers)).eval()

    def original(name: str) -> str:
        index, _, rest = name.partition(".")
        return f"{layers[int(index)][0]}.{rest}"

    return Half(
        module,
        {name: original(name) for name, _ in module.named_parameters()},
        {name: original(name) for name, _ in module.named_buffers()},
    )
