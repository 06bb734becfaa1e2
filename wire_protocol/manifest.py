"""The client bundle: a manifest and the two blobs it names. No I/O here, only what they mean.

manifest.json   what this module describes; its SHA-256 is the bundle's digest
client.onnx     the client half as a graph; every parameter and buffer is a named input
weights.bin     parameters (float32, little-endian, contiguous), then buffers
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from wire_protocol.errors import InputError
from wire_protocol.messages import MAX_MANIFEST_BYTES, Digest

# Of what `musplit export` and a run write: the client bundle and the server half.
CLIENT_FOLDER: Final = "client"
SERVER_FOLDER: Final = "server"
MANIFEST_FILE: Final = "manifest.json"
GRAPH_FILE: Final = "client.onnx"
WEIGHTS_FILE: Final = "weights.bin"
MAX_BLOB_BYTES: Final = 4 << 30

Count = Annotated[int, Meta(ge=0)]
Dimensions = Annotated[list[Annotated[int, Meta(ge=1)]], Meta(max_length=5)]


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Blob(_Strict, frozen=True):
    """A file of the bundle."""

    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_BLOB_BYTES)]


class TensorSpec(_Strict, frozen=True):
    """One graph input that is not data."""

    name: str
    shape: list[Count]
    dtype: Literal["float32", "int64"]
    offset_bytes: Count
    kind: Literal["parameter", "buffer"]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in weights.bin."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Transform(_Strict, frozen=True):
    """What makes a raw sample the graph's input; applied in the order of the fields, in float32.

    `mean` and `std` hold one number, or one per element of what the fields before have made.
    """

    channels_last: bool = False  # move the last dimension (colours) to the front
    pool: Annotated[int, Meta(ge=1)] = 1  # average over pool x pool of the last two dimensions
    scale: float = 1.0  # a factor
    mean: list[float] = []  # subtracted; empty: nothing
    std: list[float] = []  # divided by; empty: nothing


class InputSpec(_Strict, frozen=True):
    """One input of the graph; shapes are those of a sample, without the batch dimension."""

    name: str
    raw_shape: Dimensions  # as shards and data sets hold it
    shape: Dimensions  # as the graph takes it
    dtype: Literal["float32", "int64"]  # int64 (tokens) knows no transform
    transform: Transform = Transform()
    # Integers must lie in 0 .. limit - 1: the smallest table that the model looks them up in.
    limit: Annotated[int, Meta(ge=1)] | None = None


class ActivationSpec(_Strict, frozen=True):
    """What crosses the cut (without the batch dimension)."""

    name: str
    shape: Dimensions
    dtype: Literal["float32"]


class Manifest(_Strict, frozen=True):
    """Everything a device must know of its half."""

    format: Literal["musplit-bundle/1"]
    model: str
    cut: str
    classes: Annotated[int, Meta(ge=2)]
    opset: int
    graph: Blob
    weights: Blob
    parameters: Annotated[int, Meta(ge=0)]  # d_c: perturbed float32 elements, first in weights.bin
    tensors: list[TensorSpec]
    inputs: Annotated[list[InputSpec], Meta(min_length=1, max_length=8)]
    activation: ActivationSpec
    parity_max_relative_error: float
    versions: dict[str, str]
    frozen: Count = 0  # float32 elements that the model trains, and the device does not


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check a manifest. Raises InputError naming `where`."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise InputError(f"{where}: {len(data)} bytes are too many for a manifest")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: not a bundle manifest ({error}); export it again") from error
    _check_layout(manifest, where)
    return manifest


def check_blob(data: bytes, blob: Blob, where: str) -> None:
    """Raise InputError unless `data` is the blob: truncation and alteration are told apart."""
    if len(data) != blob.size_bytes:
        raise InputError(
            f"{where}: {len(data)} bytes instead of {blob.size_bytes}: truncated or from another "
            "bundle; copy it again"
        )
    if sha256(data) != blob.sha256:
        raise InputError(f"{where}: digest differs from the manifest's; copy the bundle again")


def prepare_input(x: NDArray[np.generic], spec: InputSpec) -> NDArray[Any]:
    """Raw samples (n, *spec.raw_shape) -> graph input (n, *spec.shape) of spec.dtype, as declared.

    float32 throughout, in a fixed order of operations: the same bits on every machine.
    """
    if spec.dtype == "int64":
        return x.reshape(len(x), *spec.shape).astype(np.int64)
    transform = spec.transform
    values = x.reshape(len(x), *spec.raw_shape).astype(np.float32)
    if transform.channels_last:
        values = np.moveaxis(values, -1, 1)
    if transform.pool > 1:
        values = _pool(values, transform.pool)
    flat = values.reshape(len(x), -1) * np.float32(transform.scale)
    mean = np.asarray(transform.mean or [0.0], np.float32)
    std = np.asarray(transform.std or [1.0], np.float32)
    return ((flat - mean) / std).reshape(len(x), *spec.shape)


def prepare_inputs(
    xs: Sequence[NDArray[np.generic]], specs: Sequence[InputSpec]
) -> list[NDArray[Any]]:
    """`prepare_input` of each input of a model."""
    return [prepare_input(x, spec) for x, spec in zip(xs, specs, strict=True)]


def _pool(values: NDArray[np.float32], pool: int) -> NDArray[np.float32]:
    # Summed in a fixed order: numpy's own mean may add in another one on another machine.
    total = np.zeros_like(values[..., ::pool, ::pool])
    for row in range(pool):
        for column in range(pool):
            total += values[..., row::pool, column::pool]
    return total * np.float32(1.0 / pool**2)


def misfit(manifest: Manifest, xs: Sequence[NDArray[np.generic]]) -> str:
    """Why raw samples xs[input] (n, *raw shape) do not fit the model; empty when they do."""
    if len(xs) != len(manifest.inputs):
        return f"samples have {len(xs)} arrays, model {manifest.model} takes {len(manifest.inputs)}"
    for x, spec in zip(xs, manifest.inputs, strict=True):
        if not same_shape(x.shape[1:], spec.raw_shape):
            return (
                f"samples have shape {x.shape[1:]}, model {manifest.model} takes "
                f"{tuple(spec.raw_shape)}"
            )
        if spec.dtype == "int64" and x.dtype.kind not in "bui":
            return f"samples are {x.dtype}, model {manifest.model} takes integers"
        if spec.limit is not None and x.size and not 0 <= x.min() <= x.max() < spec.limit:
            return (
                f"samples hold {x.min()} .. {x.max()}, model {manifest.model} takes integers in "
                f"0 .. {spec.limit - 1}"
            )
    return ""


def same_shape(have: tuple[int, ...], want: Sequence[int]) -> bool:
    """True when two sample shapes are equal up to dimensions of 1 (28x28 fits 1x28x28)."""
    return [n for n in have if n > 1] == [n for n in want if n > 1]


def sha256(data: bytes | NDArray[np.float32]) -> str:
    """Hexadecimal SHA-256; of an array, its bytes in row-major order."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.ravel().data).hexdigest()


def _check_layout(manifest: Manifest, where: str) -> None:
    expected = 0
    for tensor in manifest.tensors:
        if tensor.offset_bytes != expected:
            raise InputError(f"{where}: tensor {tensor.name} does not follow its predecessor")
        if tensor.kind == "parameter" and tensor.dtype != "float32":
            raise InputError(f"{where}: parameter {tensor.name} is not float32")
        expected += tensor.size_bytes
    parameters = [t for t in manifest.tensors if t.kind == "parameter"]
    if manifest.tensors[: len(parameters)] != parameters:
        raise InputError(f"{where}: parameters must come before buffers")
    if expected != manifest.weights.size_bytes:
        raise InputError(f"{where}: tensors add up to {expected} bytes, not the weights' size")
    if sum(t.size_bytes for t in parameters) != manifest.parameters * 4:
        raise InputError(f"{where}: 'parameters' does not match the tensors")
    for spec in manifest.inputs:
        _check_input(spec, where)


def _check_input(spec: InputSpec, where: str) -> None:
    if spec.dtype == "int64" and spec.transform != Transform():
        raise InputError(f"{where}: input {spec.name} holds integers, which no transform fits")
    if spec.limit is not None and spec.dtype != "int64":
        raise InputError(f"{where}: input {spec.name} holds floats, which a limit does not fit")
    pool, raw = spec.transform.pool, spec.raw_shape
    if pool > 1 and (len(raw) < 2 or any(n % pool for n in _image(spec))):
        raise InputError(
            f"{where}: input {spec.name} of shape {raw} cannot be pooled by {pool}: its image "
            "sides must be multiples of it"
        )
    elements = math.prod(spec.shape)
    if elements * pool**2 != math.prod(raw):
        raise InputError(
            f"{where}: input {spec.name} makes {math.prod(raw) // pool**2} numbers of a sample, "
            f"the graph takes {elements}"
        )
    for values in (spec.transform.mean, spec.transform.std):
        if len(values) not in (0, 1, elements):
            raise InputError(f"{where}: transform has {len(values)} numbers for {elements} inputs")


def _image(spec: InputSpec) -> list[int]:
    """The two dimensions that pooling works on."""
    return spec.raw_shape[-3:-1] if spec.transform.channels_last else spec.raw_shape[-2:]
