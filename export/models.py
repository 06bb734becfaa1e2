"""Models by name: one of the zoo, or a function or class in the user's own file.

export/zoo.py               the names of the zoo and their options
path/to/file.py:factory     called without arguments, gives an nn.Module; executed from a copy in
                            an empty folder, so that the copy in the server's folder is enough
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import nn

from export.errors import ModelError, first_line
from export.inputs import Candidate, Declared, SampleArray, candidates, settle
from export.server_half import ModelInput
from export.zoo import build_zoo

_MODULE_NAME: Final = "musplit_user_model"


class BuiltModel(NamedTuple):
    """A model in evaluation mode, what it takes, and the text of the file it came from."""

    name: str
    module: nn.Module
    inputs: tuple[ModelInput, ...]
    source: bytes | None = None


def build_model(
    name: str, seed: int, input_shape: Declared = None, arrays: Sequence[SampleArray] = ()
) -> BuiltModel:
    """Build a model with weights drawn from `seed`, on the CPU; torch's generator is left alone.

    A user's own model needs `input_shape` (see export/inputs.py) or the data's `arrays`. Raises
    ModelError.
    """
    wanted = candidates(input_shape, arrays)
    path, _, factory = name.rpartition(":")
    own = path.endswith(".py")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if own:
            module, source = _own(name, Path(path), factory)
        else:
            module, shape = build_zoo(name, wanted[0].shape if len(wanted) == 1 else None)
            source = None
    if not own:
        wanted = [_fitting(name, shape, wanted)]
    if not wanted:
        raise ModelError(
            f"model {name!r}: say what a sample looks like, e.g. --input-shape 1,28,28, or int:64 "
            "for integers"
        )
    module = module.eval()
    return BuiltModel(name, module, settle(name, module, wanted), source)


def _fitting(name: str, shape: tuple[int, ...], wanted: list[Candidate]) -> Candidate:
    sizes = [math.prod(candidate.shape) for candidate in wanted]
    if sizes not in ([], [math.prod(shape)]):
        given = " and ".join(str(candidate.shape) for candidate in wanted)
        raise ModelError(f"model {name!r} takes samples of shape {shape}, the data has {given}")
    return Candidate(shape, ("float32",))


def _own(name: str, path: Path, factory: str) -> tuple[nn.Module, bytes]:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); MODEL is path/to/file.py:factory"
        ) from error
    with tempfile.TemporaryDirectory() as alone:
        copy = Path(alone) / path.name
        copy.write_bytes(source)
        spec = importlib.util.spec_from_file_location(_MODULE_NAME, copy)
        if spec is None or spec.loader is None:
            raise ModelError(f"{path}: cannot be imported")
        code = importlib.util.module_from_spec(spec)
        sys.modules[_MODULE_NAME] = code  # dataclasses look their module up there
        try:
            spec.loader.exec_module(code)
            make = getattr(code, factory, None)
            model = make() if callable(make) else None
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ModelError(f"{path}: {type(error).__name__}: {first_line(error)}") from error
    if make is None:
        raise ModelError(f"{path}: has no function {factory!r}; MODEL is path/to/file.py:factory")
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: returns {type(model).__name__}, not an nn.Module")
    return model, source
