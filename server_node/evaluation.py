"""Test accuracy of the whole model: both halves on the server, the client half by torch."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from export.cuts import Half
from server_node.errors import DataError
from server_node.first_half import FirstHalf
from server_node.flat import parameter_views
from server_node.half import ServerHalf
from server_node.samples import Dataset
from server_node.torch_half import Scores
from wire_protocol.manifest import Manifest, misfit, prepare_inputs

_ROWS: Final = 256


class Evaluator:
    """Holds the prepared test set and the client half. Raises DataError when they do not fit."""

    def __init__(self, client: Half, manifest: Manifest, data: Dataset) -> None:
        if data.y_test.max() >= manifest.classes or data.y_train.max() >= manifest.classes:
            raise DataError(
                f"{data.name}: label {max(data.y_test.max(), data.y_train.max())} is outside "
                f"0..{manifest.classes - 1}; model {manifest.model} has {manifest.classes} classes"
            )
        fault = misfit(manifest, data.x_test)
        if fault:
            raise DataError(f"{data.name}: {fault}")
        self._module = client.module
        self._xs = prepare_inputs(data.x_test, manifest.inputs)
        self._labels = data.y_test

    @torch.inference_mode()
    def scores(self, client_weights: NDArray[np.float32], server: ServerHalf | FirstHalf) -> Scores:
        """Loss and accuracy of client weights (d_c,) with the server's base weights."""
        for _, parameter, view in parameter_views(self._module, torch.from_numpy(client_weights)):
            parameter.copy_(view)
        parts = [
            self._module(*(torch.from_numpy(x[first : first + _ROWS]) for x in self._xs)).numpy()
            for first in range(0, len(self._labels), _ROWS)
        ]
        return server.evaluate(np.concatenate(parts), self._labels)
