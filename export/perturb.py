"""What the device perturbs of its half; the rest is frozen and travels like buffers.

A choice is a list of

NAME        tensors by the model's own names; * ? [..] match as in a shell
norms       weights and biases of normalisation layers, and all biases
adapters:R  low-rank adapters of rank R (export/adapters.py)
none        nothing, and alone: the device half is frozen

and an empty list is everything. Frozen tensors cost no perturbation and no replay.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from torch import nn

from export.adapters import ADAPTER, add_adapters
from export.cuts import Half, Halves, cut_traced
from export.errors import ModelError
from export.models import BuiltModel
from export.tracing import Traced, trace

NORMS: Final = "norms"
NONE: Final = "none"
_ADAPTERS: Final = re.compile(r"adapters:([1-9]\d{0,3})", re.ASCII)
# Names that an error lists.
_NAMED: Final = 8
_NORMALISATION: Final = (
    nn.modules.batchnorm._BatchNorm,  # noqa: SLF001
    nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
)  # fmt: skip


def cut_and_choose(
    model: BuiltModel, cut: str, perturb: Sequence[str], seed: int
) -> tuple[Traced, Halves]:
    """Trace and cut a model; the client half's parameters are those that `perturb` chooses.

    Adapters are added to `model` in place; their fixed matrices are drawn from `seed`. Raises
    ModelError, CutError.
    """
    traced = trace(model)
    halves = cut_traced(traced, cut)
    if not perturb:
        return traced, halves
    ranks = [int(match[1]) for text in perturb if (match := _ADAPTERS.fullmatch(text))]
    if len(ranks) > 1:
        raise ModelError(f"perturb {list(perturb)}: give adapters one rank")
    if ranks:
        known = set(halves.client.parameter_names.values())
        if not add_adapters(model.module, known, ranks[0], seed):
            raise ModelError(
                f"perturb adapters:{ranks[0]}: the client half has no Linear or Conv2d layer that "
                "an adapter fits (grouped convolutions and tied weights have none)"
            )
        traced = trace(model)
        halves = cut_traced(traced, cut)
    chosen = _chosen(model, halves.client, perturb)
    return traced, halves._replace(client=freeze_rest(halves.client, chosen))


def freeze_rest(half: Half, chosen: set[str]) -> Half:
    """The half with every parameter that is not in `chosen` (names in the model) as a buffer."""
    parameters, buffers = dict(half.parameter_names), dict(half.buffer_names)
    for own, name in half.parameter_names.items():
        if name not in chosen:
            tensor = half.module.get_parameter(own).detach()
            delattr(half.module, own)
            half.module.register_buffer(own, tensor)
            buffers[own] = parameters.pop(own)
    return half._replace(parameter_names=parameters, buffer_names=buffers)


def _chosen(model: BuiltModel, half: Half, perturb: Sequence[str]) -> set[str]:
    """Names of the parameters to perturb. Raises ModelError naming what fits nothing."""
    names = list(half.parameter_names.values())
    if NONE in perturb:
        if len(perturb) > 1:
            raise ModelError(f"perturb {list(perturb)}: 'none' stands alone")
        return set()
    chosen: set[str] = set()
    for text in perturb:
        if _ADAPTERS.fullmatch(text):
            found = {name for name in names if name.endswith(ADAPTER)}
        elif text == NORMS:
            found = _norms(model.module, names)
        else:
            found = {name for name in names if fnmatchcase(name, text)}
        if not found:
            raise ModelError(f"perturb {text!r}: {_nothing(text, names)}")
        chosen |= found
    return chosen


def _norms(module: nn.Module, names: list[str]) -> set[str]:
    layers = {
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, _NORMALISATION)
        for name, _ in layer.named_parameters(recurse=False)
    }
    return {n for n in names if n in layers or "bias" in n.rpartition(".")[2]}


def _nothing(text: str, names: list[str]) -> str:
    if text == NORMS:
        return "the client half has no normalisation layer and no bias"
    near = difflib.get_close_matches(text, names, _NAMED, 0.5) or names[:_NAMED]
    more = ", .." if len(names) > len(near) else ""
    return (
        f"no tensor of the client half has that name; there are {', '.join(near)}{more}, and "
        "'norms', 'adapters:R', 'none'"
    )
