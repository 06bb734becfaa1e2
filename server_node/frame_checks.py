"""What a frame must be to belong to a run."""

from __future__ import annotations

import numpy as np

from server_node.config import Config
from server_node.errors import FrameFaultError, NotFiniteError
from wire_protocol.frames import Frame, FrameKind
from wire_protocol.manifest import Manifest


def check_frame(frame: Frame, config: Config, manifest: Manifest) -> None:
    """Raise FrameFaultError unless a frame's encoding, shape and labels fit the run.

    Raises NotFiniteError when only its values do not.
    """
    if frame.encoding not in (config.wire.encoding, "float32"):  # float32 holds what others cannot
        raise FrameFaultError(f"frame in {frame.encoding}, the run wants {config.wire.encoding}")
    batch = config.devices.batch
    shape = (batch, *manifest.activation.shape)
    name = frame.kind.name.lower()
    differences = config.method.feedback == "loss_difference"
    if frame.kind is not FrameKind.ACTIVATION and not (
        differences and frame.kind is FrameKind.DIFFERENCES
    ):
        raise FrameFaultError(f"{name}, which this run's devices do not send")
    activation = frame.kind is FrameKind.ACTIVATION
    have = frame.tensor.shape if activation else frame.tensor.shape[1:]
    labels = batch if activation else 0
    if have != shape or len(frame.labels) != labels or not len(frame.tensor):
        raise FrameFaultError(
            f"{name} of shape {frame.tensor.shape} with {len(frame.labels)} labels, the run wants "
            f"{shape} with {labels}"
        )
    if activation and int(frame.labels.max()) >= manifest.classes:
        raise FrameFaultError(
            f"label {int(frame.labels.max())} is outside 0..{manifest.classes - 1}"
        )
    if not np.isfinite(frame.tensor).all():
        raise NotFiniteError(f"{name} holds values that are not finite")
