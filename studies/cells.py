"""One run of a study: what it is, what it gave, and its file, written at once or not at all."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from server_node.config import Config
from server_node.files import replace_file

_FORMAT: Final = 1


class Point(Struct, frozen=True, forbid_unknown_fields=True):
    """One evaluation, counters cumulative over the run; None: this backend does not measure it."""

    round: int  # rounds done
    simulated_s: float | None
    accuracy: float
    loss: float | None  # None also: not finite
    bytes_up: int | None
    bytes_down: int | None
    client_forwards: float | None  # forwards of one batch through the client half
    server_steps: int | None


class Result(Struct, frozen=True, forbid_unknown_fields=True):
    """What a run gave."""

    points: list[Point]
    outcome: str  # "complete" or "diverged"
    client_rounds: int | None  # batches of devices that something was learnt from
    train_samples: int
    parameters_client: int | None
    parameters_server: int | None
    client_changed: bool | None
    seconds: float  # of this machine


class Spec(Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides what a run gives. `inputs_sha256`: of the samples and files it reads."""

    kind: str
    config: Config
    options: dict[str, Any]
    inputs_sha256: str

    @property
    def digest(self) -> str:
        """Name of its file. The data count by their content, not by where they lie."""
        fields = msgspec.to_builtins(self)
        del fields["config"]["data"]["source"]
        return _sha256({"format": _FORMAT, **fields})


class _Stored(Struct, frozen=True, forbid_unknown_fields=True):
    digest: str
    spec: Spec
    result: Result
    sha256: str


def cell_path(folder: Path, digest: str) -> Path:
    """Where the run's file lies below the study's folder."""
    return folder / "cells" / f"{digest}.json"


def work_folder(folder: Path) -> Path:
    """Where runs keep their files while they are computed; what is left there is rubbish."""
    return folder / "work"


def write_cell(folder: Path, spec: Spec, result: Result) -> None:
    """Write the file of a finished run, atomically."""
    stored = _Stored(spec.digest, spec, result, _sha256(msgspec.to_builtins(result)))
    data = msgspec.json.format(msgspec.json.encode(stored), indent=1) + b"\n"
    path = cell_path(folder, spec.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(data))


def read_cell(folder: Path, digest: str) -> Result | None:
    """What the file of a run says; None when there is none, or it is damaged."""
    try:
        stored = msgspec.json.decode(cell_path(folder, digest).read_bytes(), type=_Stored)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    whole = stored.digest == digest and stored.sha256 == _sha256(msgspec.to_builtins(stored.result))
    return stored.result if whole else None


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _sha256(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
