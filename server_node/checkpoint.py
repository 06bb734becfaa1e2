"""Checkpoints: both halves' weights at a round, in one npz file, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHECKPOINT_FILE: Final = "checkpoint.npz"


def save_checkpoint(
    folder: Path, next_round: int, client: NDArray[np.float32], server: NDArray[np.float32]
) -> None:
    """Write FOLDER/checkpoint.npz: client (d_c,), server (d_s,), next_round."""
    temporary = folder / "checkpoint.new"
    with temporary.open("wb") as file:
        np.savez(file, client=client, server=server, next_round=np.int64(next_round))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CHECKPOINT_FILE)
