"""Checkpoints: both halves at a round, in one npz file, replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.files import replace_file
from wire_protocol.errors import InputError
from wire_protocol.npz import parse_npz

CHECKPOINT_FILE: Final = "checkpoint.npz"
# In first order: where frames.bin begins, when it does not begin with the run.
ANCHOR_FILE: Final = "anchor.npz"

Vector = NDArray[np.float32]

_NOTHING: Final = np.empty(0, np.float32)


class Checkpoint(NamedTuple):
    """State (d_c and the optimiser's,) and weights (d_s,) before round `next_round`."""

    next_round: int
    client: Vector
    server: Vector
    optimiser: Vector = _NOTHING  # first order: the server optimiser's state (n,)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, name: str = CHECKPOINT_FILE) -> None:
    """Write FOLDER/NAME: client, server, optimiser, next_round."""
    arrays = checkpoint._asdict() | {"next_round": np.int64(checkpoint.next_round)}
    replace_file(folder / name, lambda file: np.savez(file, **arrays))


def load_checkpoint(folder: Path, name: str = CHECKPOINT_FILE) -> Checkpoint:
    """Read FOLDER/NAME. Raises InputError when it is missing or damaged.

    Whether these are a run's weights only the digests in its journal can tell.
    """
    path = folder / name
    try:
        with path.open("rb") as file:
            arrays = parse_npz(file, ("client", "server", "optimiser", "next_round"), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    found = [arrays[name] for name in ("client", "server", "optimiser")]
    number = arrays["next_round"]
    vectors = all(a.dtype == np.float32 and a.ndim == 1 for a in found)
    if not vectors or number.dtype != np.int64 or number.ndim:
        raise InputError(f"{path}: not a checkpoint")
    return Checkpoint(int(number), *found)
