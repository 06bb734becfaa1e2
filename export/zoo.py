"""Models by name: the zoo's, or a function in the user's own file.

mlp:64-32-32-10          widths, input first, classes last; ReLU between
lenet                    LeNet-5 for 1x28x28 (LeCun et al. 1998), 10 classes; lenet:N for N classes
path/to/file.py:factory  a function without arguments that returns an nn.Sequential
"""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from export.errors import ModelError


class BuiltModel(NamedTuple):
    """A model in evaluation mode, the sample shape it takes, and the file it came from."""

    name: str
    module: nn.Sequential
    input_shape: tuple[int, ...]
    source: Path | None


def build_model(name: str, seed: int, input_shape: tuple[int, ...] | None) -> BuiltModel:
    """Build a model with weights drawn from `seed`, on the CPU; torch's generator is left alone.

    `input_shape` (without batch) is needed for a user's own model. Raises ModelError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        path, _, factory = name.rpartition(":")
        if path.endswith(".py"):
            return _build_own(name, Path(path), factory, input_shape)
        kind, _, argument = name.partition(":")
        if kind == "mlp":
            module, shape = _mlp(name, argument, input_shape)
        elif kind == "lenet":
            module, shape = _lenet(name, argument), (1, 28, 28)
        else:
            raise ModelError(
                f"model {name!r} is unknown: use mlp:64-32-32-10, lenet, or path/to/file.py:factory"
            )
    if input_shape is not None and math.prod(shape) != math.prod(input_shape):
        raise ModelError(
            f"model {name!r} takes samples of shape {shape}, the data has {input_shape}"
        )
    return BuiltModel(name, module.eval(), shape, None)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _mlp(
    name: str, argument: str, input_shape: tuple[int, ...] | None
) -> tuple[nn.Sequential, tuple[int, ...]]:
    try:
        widths = [int(width) for width in argument.split("-")]
    except ValueError as error:
        raise ModelError(f"model {name!r}: write the widths as in mlp:64-32-32-10") from error
    if input_shape is not None and math.prod(input_shape) != widths[0]:
        fitting = "-".join(map(str, [math.prod(input_shape), *widths[1:]]))
        raise ModelError(
            f"model {name!r}: takes {widths[0]} inputs, a sample of the data has "
            f"{math.prod(input_shape)}: use mlp:{fitting}"
        )
    if len(widths) < 3 or min(widths) < 1:
        raise ModelError(f"model {name!r}: an mlp to be cut needs three widths or more, all >= 1")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), 1):
        linear = nn.Linear(fan_in, fan_out)
        last = i == len(widths) - 1
        layers[f"fc{i}"] = linear if last else nn.Sequential(linear, nn.ReLU())
    return nn.Sequential(layers), input_shape or (widths[0],)


def _lenet(name: str, argument: str) -> nn.Sequential:
    if argument and not (argument.isdecimal() and int(argument) >= 2):
        raise ModelError(f"model {name!r}: the number after lenet: is the number of classes")
    classes = int(argument) if argument else 10
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            conv2=nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            flatten=nn.Flatten(),
            fc1=nn.Sequential(nn.Linear(400, 120), nn.ReLU()),
            fc2=nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
            fc3=nn.Linear(84, classes),
        )
    )


def _build_own(
    name: str, path: Path, factory: str, input_shape: tuple[int, ...] | None
) -> BuiltModel:
    if input_shape is None:
        raise ModelError(
            f"model {name!r}: say what a sample looks like, e.g. --input-shape 1,28,28"
        )
    if not path.is_file():
        raise ModelError(f"{path}: no such file; MODEL is path/to/file.py:factory")
    spec = importlib.util.spec_from_file_location("musplit_user_model", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, factory, None)
        model = make() if callable(make) else None
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(f"{path}: {type(error).__name__}: {first_line(error)}") from error
    if make is None:
        raise ModelError(f"{path}: has no function {factory!r}; MODEL is path/to/file.py:factory")
    if not isinstance(model, nn.Sequential):
        raise ModelError(f"{name}: returns {type(model).__name__}, not an nn.Sequential")
    return BuiltModel(name, model.eval(), input_shape, path)
