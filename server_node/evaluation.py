"""Test accuracy of the whole model: both halves on the server, the client half by torch."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from export.cuts import Half
from server_node.datasets import Dataset
from server_node.errors import DataError
from server_node.half import Scores, ServerHalf
from wire_protocol.manifest import Manifest, prepare_input, same_shape

_ROWS: Final = 1024


class Evaluator:
    """Holds the prepared test set and the client half. Raises DataError when they do not fit."""

    def __init__(self, client: Half, manifest: Manifest, data: Dataset) -> None:
        if data.y_test.max() >= manifest.classes or data.y_train.max() >= manifest.classes:
            raise DataError(
                f"{data.name}: label {max(data.y_test.max(), data.y_train.max())} is outside "
                f"0..{manifest.classes - 1}; model {manifest.model} has {manifest.classes} classes"
            )
        if not same_shape(data.x_test.shape[1:], manifest.input.shape):
            raise DataError(
                f"{data.name}: samples have shape {data.x_test.shape[1:]}, model {manifest.model} "
                f"takes {tuple(manifest.input.shape)}"
            )
        self._module = client.module
        self._x = prepare_input(data.x_test, manifest.input)
        self._labels = data.y_test

    @torch.inference_mode()
    def scores(self, client_weights: NDArray[np.float32], server: ServerHalf) -> Scores:
        """Loss and accuracy of client weights (d_c,) with the server's base weights."""
        offset = 0
        for parameter in self._module.parameters():
            part = client_weights[offset : offset + parameter.numel()]
            parameter.copy_(torch.from_numpy(part.reshape(tuple(parameter.shape))))
            offset += parameter.numel()
        parts = [
            self._module(torch.from_numpy(self._x[first : first + _ROWS])).numpy()
            for first in range(0, len(self._x), _ROWS)
        ]
        return server.evaluate(np.concatenate(parts), self._labels)
