"""Checkpoints: both halves' weights at a round, in one npz file, replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.files import replace_file
from wire_protocol.errors import InputError
from wire_protocol.npz import parse_npz

CHECKPOINT_FILE: Final = "checkpoint.npz"

Vector = NDArray[np.float32]


class Checkpoint(NamedTuple):
    """Weights (d_c,) and (d_s,) before round `next_round`."""

    next_round: int
    client: Vector
    server: Vector


def save_checkpoint(folder: Path, next_round: int, client: Vector, server: Vector) -> None:
    """Write FOLDER/checkpoint.npz: client (d_c,), server (d_s,), next_round."""
    replace_file(
        folder / CHECKPOINT_FILE,
        lambda file: np.savez(file, client=client, server=server, next_round=np.int64(next_round)),
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read FOLDER/checkpoint.npz. Raises InputError when it is missing or damaged.

    Whether these are a run's weights only the digests in its journal can tell.
    """
    path = folder / CHECKPOINT_FILE
    try:
        with path.open("rb") as file:
            arrays = parse_npz(file, ("client", "server", "next_round"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    client, server, number = arrays["client"], arrays["server"], arrays["next_round"]
    vectors = all(a.dtype == np.float32 and a.ndim == 1 for a in (client, server))
    if not vectors or number.dtype != np.int64 or number.ndim:
        raise InputError(f"{path}: not a checkpoint")
    return Checkpoint(int(number), client, server)
