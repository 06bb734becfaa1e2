"""What the bundle declares of a model's inputs: the raw sample, the graph's, and what lies between.

The statistics are fitted on what `prepare_input` makes of the training samples, hence on the
numbers that a device computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.errors import ModelError
from export.inputs import SampleArray
from server_node.config import Config
from server_node.errors import ConfigError, DataError
from server_node.samples import Dataset
from server_node.sections import DataSection
from wire_protocol.manifest import InputSpec, Transform, prepare_input, same_shape
from wire_protocol.messages import MAX_MANIFEST_BYTES

_MAX_DIMS: Final = 5  # of a sample, as the manifest has it
_BLOCK_ELEMENTS: Final = 1 << 20  # 8 MiB of float64 at a time
# Of a mean and a deviation in the manifest: 17 digits, exponent, indentation, each.
_STATISTIC_BYTES: Final = 80
# Colours: grey with alpha, RGB, RGB with alpha.
_COLOURS: Final = (2, 3, 4)
_POOLS: Final = range(1, 17)  # that an error proposes

_Moments = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


class Declared(NamedTuple):
    """One input; shapes are those of a sample."""

    raw_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transform: Transform


def declare(
    section: DataSection, xs: Sequence[NDArray[np.generic]],
    dtypes: Sequence[Literal["float32", "int64"]],
) -> list[Declared]:  # fmt: skip
    """Declare the inputs xs[input] (n, *sample shape) of the training set, by the graph's dtypes.

    channels_last, pool and scale act on the first input, standardise on each by its own
    statistics; int64 inputs are taken as they are. Raises ConfigError naming the field, DataError.
    """
    plain = msgspec.structs.replace(section, channels_last=False, pool=1, scale=1.0)
    sections = [section, *[plain] * (len(xs) - 1)]
    inputs = zip(sections, xs, dtypes, strict=True)
    return [_declare(own, x, dtype) for own, x, dtype in inputs]


def sample_arrays(section: DataSection, data: Dataset) -> list[SampleArray]:
    """What an export must know of the data. Statistics are those of the public samples, if any.

    Raises ConfigError naming the field, DataError.
    """
    known = data.x_public or data.x_train
    declared = declare(section, known, ["float32"] * len(known))
    return [
        SampleArray(have.raw_shape, x.dtype.kind in "bui", have.transform)
        for x, have in zip(known, declared, strict=True)
    ]


def _declare(section: DataSection, x: NDArray[np.generic], dtype: str) -> Declared:
    raw = x.shape[1:] or (1,)
    if len(raw) > _MAX_DIMS:
        raise DataError(f"{section.source}: samples of {len(raw)} dimensions; at most {_MAX_DIMS}")
    if dtype == "int64":
        return Declared(raw, raw, Transform())
    if len(raw) > 2 and raw[-1] == 1 and not section.channels_last:
        raw = (1, *raw[:-1])  # HxWx1 lies in memory as 1xHxW does
    shape = _moved(raw, channels_last=section.channels_last, pool=section.pool)
    transform = Transform(section.channels_last, section.pool, section.scale)
    if section.standardise != "none":
        spec = InputSpec("x", list(raw), list(shape), "float32", transform)
        mean, std = _statistics(x, spec, section)
        transform = msgspec.structs.replace(transform, mean=mean, std=std)
    return Declared(raw, shape, transform)


def _moved(raw: tuple[int, ...], *, channels_last: bool, pool: int) -> tuple[int, ...]:
    """Shape of a raw sample after channels_last and pool. Raises ConfigError."""
    if channels_last and len(raw) < 2:
        raise ConfigError(f"data.channels_last: samples of {dims(raw)} have one dimension only")
    shape = (raw[-1], *raw[:-1]) if channels_last else raw
    if pool == 1:
        return shape
    # With colours a sample has three dimensions; without them two are an image.
    if len(shape) < (3 if channels_last else 2):
        raise ConfigError(f"data.pool: samples of {dims(raw)} are no images")
    if any(side % pool for side in shape[-2:]):
        hint = "; set data.channels_last = true" if _colours_last(shape) else ""
        raise ConfigError(
            f"data.pool: {pool} does not divide {dims(shape[-2:])}, the last two dimensions of a "
            f"sample{hint}"
        )
    return (*shape[:-2], shape[-2] // pool, shape[-1] // pool)


def _statistics(
    x: NDArray[np.generic], spec: InputSpec, section: DataSection
) -> tuple[list[float], list[float]]:
    """Mean and deviation of the prepared x: one of all, or one of each element.

    What is constant keeps its scale. Raises ConfigError, DataError.
    """
    each = section.standardise == "feature"
    if each and math.prod(spec.shape) * _STATISTIC_BYTES > MAX_MANIFEST_BYTES:
        raise ConfigError(
            f"data.standardise: 'feature' of {math.prod(spec.shape)} elements is too much for a "
            "bundle's manifest; use 'global'"
        )
    mean, deviation, constant = _moments(x, spec, axis=0 if each else None)
    std = deviation.astype(np.float32)
    std[constant | (std == 0)] = 1
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise DataError(f"{section.source}: x_train times data.scale is too large for float32")
    return mean.astype(np.float32).tolist(), std.tolist()


def _moments(x: NDArray[np.generic], spec: InputSpec, axis: int | None) -> _Moments:
    """Mean, deviation, and what is constant, in one pass over blocks, in float64.

    Blocks are merged as in Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979).
    """
    rows = max(1, _BLOCK_ELEMENTS // math.prod(spec.shape))
    count = 0
    mean, squares = np.zeros(1), np.zeros(1)
    low, high = np.full(1, np.inf), np.full(1, -np.inf)
    for first in range(0, len(x), rows):
        with np.errstate(over="ignore", invalid="ignore"):  # told by the result
            prepared = prepare_input(x[first : first + rows], spec)
            block = prepared.reshape(len(prepared), -1).astype(np.float64)
            size = len(block) if axis == 0 else block.size
            block_mean = block.mean(axis=axis)
            apart = block_mean - mean
            squares = squares + np.square(block - block_mean).sum(axis=axis)
            squares += apart**2 * (count * size / (count + size))
            mean = mean + apart * (size / (count + size))
            low = np.minimum(low, block.min(axis=axis))
            high = np.maximum(high, block.max(axis=axis))
            count += size
    constant = low == high
    # Rounding would make a constant vary.
    return np.where(constant, low, mean), np.sqrt(squares / count), constant


def check_fit(config: Config, declared: Declared, wanted: Sequence[int]) -> None:
    """Raise ConfigError unless the declared sample is what the model takes, with the remedy.

    Dimensions of 1 do not count, and a flat sample takes any shape of as many elements.
    """
    if not _fits(declared.shape, wanted):
        remedy = _remedy(config.data, declared.raw_shape, wanted)
        raise ConfigError(
            f"model {config.model.name}: takes samples of {dims(wanted)}, the data's are "
            f"{dims(declared.shape)} after the declared transform{remedy and f'; set {remedy}'}"
        )


@contextmanager
def explained(config: Config, declared: Declared) -> Iterator[None]:
    """Add to a model's complaint about the sample's shape what to set, as far as it can be told."""
    try:
        yield
    except ModelError as error:
        hint = _hint(config, declared, str(error))
        if not hint:
            raise
        raise ConfigError(f"{error}{hint}") from error


def _hint(config: Config, declared: Declared, complaint: str) -> str:
    kind, _, argument = config.model.name.partition(":")
    width = argument.partition("-")[0]
    if kind == "mlp" and width.isdecimal():
        remedy = _remedy(config.data, declared.raw_shape, (int(width),))
        return remedy and f"; or set {remedy}"
    given = [side for side in config.model.input_shape if isinstance(side, int)]
    if given:
        remedy = _remedy(config.data, declared.raw_shape, given)
        return remedy and f"; set {remedy}"
    shape = declared.shape
    if str(shape) not in complaint:
        return ""
    if _colours_last(shape) and not config.data.channels_last:
        moved = (shape[-1], *shape[:-1])
        return f"; if the model wants {dims(moved)}, set data.channels_last = true"
    return ""


def _remedy(section: DataSection, raw: tuple[int, ...], wanted: Sequence[int]) -> str:
    """The fields to change so that a raw sample becomes what is wanted; empty: none does it."""
    have = {"channels_last": section.channels_last, "pool": section.pool}
    for channels_last in (section.channels_last, not section.channels_last):
        for pool in (section.pool, *_POOLS):
            try:
                shape = _moved(raw, channels_last=channels_last, pool=pool)
            except ConfigError:
                continue
            want = {"channels_last": channels_last, "pool": pool}
            if want != have and _fits(shape, wanted):
                changes = [
                    f"data.{field} = {str(value).lower()}"
                    for field, value in want.items()
                    if value != have[field]
                ]
                return " and ".join(changes)
    return ""


def _fits(have: Sequence[int], wanted: Sequence[int]) -> bool:
    flat = min(sum(n > 1 for n in shape) for shape in (have, wanted)) <= 1
    return same_shape(tuple(have), wanted) or (flat and math.prod(have) == math.prod(wanted))


def _colours_last(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[-1] in _COLOURS and shape[0] not in _COLOURS


def dims(shape: Sequence[int]) -> str:
    """A shape for people: 3x32x32."""
    return "x".join(map(str, shape))
