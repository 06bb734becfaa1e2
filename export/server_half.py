"""The server half's folder: weights, a manifest, and the user's model file when there is one.

manifest.json   which model, cut after what, d_s and the weights' digest
weights.bin     parameters, float32, little-endian, contiguous, then buffers
model.py        only for the user's own model: a copy of the file, so that the folder is enough

This folder never leaves the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from export.errors import HalfError
from wire_protocol.errors import InputError
from wire_protocol.manifest import MANIFEST_FILE, WEIGHTS_FILE, Blob, check_blob, sha256

MODEL_FILE: Final = "model.py"

Dtype = Literal["float32", "int64"]


class ModelInput(Struct, frozen=True, forbid_unknown_fields=True):
    """One input as the model takes it; the shape is without the batch dimension."""

    shape: tuple[int, ...]
    dtype: Dtype


class ServerManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What the server half is; shapes are without the batch dimension."""

    format: Literal["musplit-server-half/1"]
    model: str
    cut: str
    seed: int
    inputs: list[ModelInput]
    parameters: Annotated[int, Meta(ge=1)]  # d_s: perturbed float32 elements, first in weights.bin
    weights: Blob
    model_file_sha256: str  # "" for a model of the zoo
    start_weights_sha256: str  # of the safetensors file that was started from; "" without one
    perturb: list[str] = []  # what the device perturbs (export/perturb.py); empty: everything


def write_server_half(
    folder: Path, manifest: ServerManifest, weights: bytes, source: bytes | None
) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    if source is not None:
        (folder / MODEL_FILE).write_bytes(source)
    (folder / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def read_server_half(folder: Path) -> tuple[ServerManifest, NDArray[np.float32]]:
    """The manifest and the flat server weights (d_s,): no torch needed. Raises HalfError."""
    data, weights = _read(folder / MANIFEST_FILE), _read(folder / WEIGHTS_FILE)
    try:
        manifest = msgspec.json.decode(data, type=ServerManifest)
        check_blob(weights, manifest.weights, str(folder / WEIGHTS_FILE))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HalfError(f"{folder / MANIFEST_FILE}: not a server half ({error})") from error
    except InputError as error:
        raise HalfError(str(error)) from error
    source = manifest.model_file_sha256
    if source and sha256(_read(folder / MODEL_FILE)) != source:
        raise HalfError(f"{folder / MODEL_FILE}: was altered since the export; export again")
    if manifest.parameters * 4 > len(weights):
        raise HalfError(f"{folder / MANIFEST_FILE}: 'parameters' exceeds the weights")
    return manifest, np.frombuffer(weights, "<f4", manifest.parameters).astype(np.float32)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HalfError(
            f"{path}: cannot be read ({error.strerror}); a server half holds {MANIFEST_FILE} "
            f"and {WEIGHTS_FILE}"
        ) from error
