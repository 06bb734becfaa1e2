"""The loss differences survive the encodings: what training lives on is wrong by less than 1 %."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_support import DIGITS

from emulation.inprocess import InProcessFleet
from server_node.config import load_config
from server_node.half import ServerHalf
from server_node.prepare import prepare
from server_node.torch_half import ActivationBatch
from wire_protocol.frames import Frame, FrameKind, decode_frame, encode_frame

STEPS = 200
NO_LABELS = np.empty(0, np.uint32)
COMMON = [
    "devices.count=1", "method.directions_client=8", "method.tau=4", "evaluation.every=25",
    "run.rounds=25", "method.lam=1e-3",
]  # fmt: skip
LENET = ["model.name=lenet", "model.cut=conv1", "method.eta_c=2e-4", "method.eta_s=1e-3"]


def sent(tensor: np.ndarray, kind: FrameKind, encoding: str) -> np.ndarray:
    """What the server gets of a tensor."""
    frame = Frame(kind, 1, 2, 3, 0, tensor, NO_LABELS, encoding)
    return decode_frame(encode_frame(frame)).tensor


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The digits, enlarged to 28x28."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    small = load_digits()
    x = np.pad(np.kron(small.images, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    x = x[:, None].astype(np.float32)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, x_train=x[:600], y_train=small.target[:600], x_test=x[600:700],
             y_test=small.target[600:700])  # fmt: skip
    return path


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_scalars_are_wrong_by_at_most_1_percent_of_their_rms(model, images, tmp_path, monkeypatch):
    """Over a run in float32, whose every measurement is repeated from encoded tensors."""
    scalars: dict[str, list[float]] = {"float32": [], "float16": [], "int8": []}
    measure = ServerHalf.measure

    def measure_all(half, device, batch, differences, done):
        for encoding in scalars:
            h = sent(batch.h.numpy(), FrameKind.ACTIVATION, encoding)
            d = sent(differences, FrameKind.DIFFERENCES, encoding)
            encoded = ActivationBatch(torch.from_numpy(h.copy()), batch.labels)
            scalars[encoding] += measure(half, device, encoded, d, done)
        return scalars["float32"][-len(differences) :]

    monkeypatch.setattr(ServerHalf, "measure", measure_all)
    own = [*LENET, f"data.source={images}"] if model == "lenet" else []
    InProcessFleet(prepare(load_config(DIGITS, [*COMMON, *own]), tmp_path)).run()
    true = np.array(scalars.pop("float32"))
    assert len(true) == STEPS
    for encoding, found in scalars.items():
        error = np.sqrt(((np.array(found) - true) ** 2).mean() / (true**2).mean())
        assert error < 0.01, encoding
