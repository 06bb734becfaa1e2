"""What a model takes: shape and type of each input, declared, known or found out.

Written as in `--input-shape` and `model.input_shape`, one text per input, without the batch:

1,28,28     float32; int64 when the model only takes integers there and the data holds integers
int:64      int64
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.errors import ModelError, first_line
from export.server_half import Dtype, ModelInput
from wire_protocol.manifest import InputSpec, Transform
from wire_protocol.npz import input_name

Declared = Sequence[int | str] | None

MAX_INPUTS: Final = 8  # as many as a manifest holds
# As many axes as a manifest's shape holds.
_MAX_DIMS: Final = 5
_INTEGER: Final = "int:"
TORCH_DTYPES: Final = {"float32": torch.float32, "int64": torch.int64}


class SampleArray(NamedTuple):
    """One array of a data set: shape of a raw sample, and what is declared to be done to it."""

    raw_shape: tuple[int, ...]
    integer: bool = False
    transform: Transform = Transform()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample after the transform."""
        shape = self.raw_shape
        if self.transform.channels_last:
            shape = (shape[-1], *shape[:-1])
        pool = self.transform.pool
        return (*shape[:-2], *(n // pool for n in shape[-2:])) if pool > 1 else shape


class Candidate(NamedTuple):
    """An input whose type is still open: `dtypes` are tried in their order."""

    shape: tuple[int, ...]
    dtypes: tuple[Dtype, ...]


def parse_declared(declared: Declared) -> list[Candidate]:
    """Integers are the shape of one input; texts are one input each. Raises ModelError."""
    if not declared:
        return []
    texts = [value for value in declared if isinstance(value, str)]
    if not texts:
        texts = [",".join(str(value) for value in declared)]
    elif len(texts) < len(declared) or len(texts) > MAX_INPUTS:
        raise ModelError(
            f"input shape {list(declared)}: write one shape, as in [1, 28, 28], or one text per "
            f'input, as in ["1,28,28", "int:64"], at most {MAX_INPUTS}'
        )
    return [_parse(text) for text in texts]


def candidates(declared: Declared, arrays: Sequence[SampleArray]) -> list[Candidate]:
    """What each input may be, by declaration and by data; none when neither says. ModelError."""
    wanted = parse_declared(declared)
    if not arrays:
        return wanted
    if not wanted:
        wanted = [Candidate(array.shape, ("float32", "int64")) for array in arrays]
    if len(wanted) != len(arrays):
        raise ModelError(
            f"the input shape is given for {len(wanted)} inputs, a sample of the data has "
            f"{len(arrays)} arrays"
        )
    return [_fitted(want, array) for want, array in zip(wanted, arrays, strict=True)]


def settle(name: str, module: nn.Module, open_: Sequence[Candidate]) -> tuple[ModelInput, ...]:
    """The first types with which the model runs, floats before integers. Raises ModelError."""
    choices = sorted(
        itertools.product(*(candidate.dtypes for candidate in open_)),
        key=lambda dtypes: dtypes.count("int64"),
    )
    shapes = [candidate.shape for candidate in open_]
    causes: list[Exception] = []
    for dtypes in choices:
        inputs = tuple(ModelInput(*pair) for pair in zip(shapes, dtypes, strict=True))
        cause = _refusal(module, inputs)
        if cause is None:
            return inputs
        causes.append(cause)
    shown = " and ".join(str(shape) for shape in shapes)
    # An embedding refuses floats for their type; why it refuses integers says more.
    cause = next((c for c in causes if "scalar types" not in str(c)), causes[0])
    raise ModelError(
        f"model {name}: does not take samples of shape {shown}: {first_line(cause)}"
        f"{_hint(module, open_)}"
    ) from cause


def example(
    inputs: Sequence[ModelInput] | Sequence[InputSpec], batch: int
) -> tuple[torch.Tensor, ...]:
    """Zeros (batch, *shape) of each input."""
    return tuple(torch.zeros(batch, *i.shape, dtype=TORCH_DTYPES[i.dtype]) for i in inputs)


def draw(
    inputs: Sequence[InputSpec], batch: int, random: np.random.Generator
) -> list[NDArray[Any]]:
    """Random inputs (batch, *shape): normal numbers, or integers within the input's limit."""
    return [
        random.integers(0, spec.limit or 2, (batch, *spec.shape))
        if spec.dtype == "int64"
        else random.standard_normal((batch, *spec.shape)).astype(np.float32)
        for spec in inputs
    ]


def input_specs(
    inputs: Sequence[ModelInput], arrays: Sequence[SampleArray], limits: Sequence[int | None]
) -> list[InputSpec]:
    """The manifest's words for the inputs; without data a raw sample is what the model takes."""
    arrays = arrays or [SampleArray(i.shape) for i in inputs]
    return [
        InputSpec(
            input_name("input", index), list(array.raw_shape), list(i.shape), i.dtype,
            array.transform if i.dtype == "float32" else Transform(), limit,
        )
        for index, (i, array, limit) in enumerate(zip(inputs, arrays, limits, strict=True))
    ]  # fmt: skip


def _parse(text: str) -> Candidate:
    integer = text.startswith(_INTEGER)
    parts = text.removeprefix(_INTEGER).split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ModelError(f"input shape {text!r}: write positive numbers, as in 1,28,28 or int:64")
    if len(parts) > _MAX_DIMS:
        raise ModelError(f"input shape {text!r}: has more than {_MAX_DIMS} dimensions")
    shape = tuple(int(part) for part in parts)
    return Candidate(shape, ("int64",) if integer else ("float32", "int64"))


def _fitted(want: Candidate, array: SampleArray) -> Candidate:
    if math.prod(want.shape) != math.prod(array.shape):
        raise ModelError(
            f"the model is to take samples of shape {want.shape}, the data has {array.shape}: "
            "these are not as many numbers"
        )
    if array.integer:
        return want
    if want.dtypes == ("int64",):
        raise ModelError("the model is to take integers, the data holds floats")
    return Candidate(want.shape, ("float32",))


def _refusal(module: nn.Module, inputs: Sequence[ModelInput]) -> Exception | None:
    with torch.no_grad():
        try:
            module(*example(inputs, 2))
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            return error
    return None


def _hint(module: nn.Module, open_: Sequence[Candidate]) -> str:
    """A shape of the same size that the model does take, and how to say so."""
    if len(open_) > 1:
        return "; give one --input-shape for each input, in the order of forward's arguments"
    (candidate,) = open_
    flat = (math.prod(candidate.shape),)
    for shape in ((1, *candidate.shape), flat, (1, *flat), (*flat, 1)):
        for dtype in candidate.dtypes:
            if _refusal(module, [ModelInput(shape, dtype)]) is None:
                text = ",".join(map(str, shape))
                return (
                    f"; it takes {shape}: give --input-shape {text} (in a run: "
                    f"--set 'model.input_shape=[{text}]')"
                )
    return (
        "; say what a sample looks like, e.g. --input-shape 1,28,28 (in a run: "
        "--set 'model.input_shape=[1,28,28]')"
    )
