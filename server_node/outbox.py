"""Where a run's messages go: the MQTT node, the in-process fleet and tests bring their own."""

from __future__ import annotations

from typing import Protocol

from wire_protocol.frames import Frame
from wire_protocol.messages import DownMessage


class Outbox(Protocol):
    """Where a run's messages go."""

    def broadcast(self, message: DownMessage) -> None:
        """To every device."""
        ...

    def send(self, device: int, message: DownMessage) -> None:
        """To one device, by index."""
        ...

    def send_frame(self, device: int, frame: Frame) -> None:
        """A tensor to one device, by index; the frame's epoch is filled in."""
        ...

    def offer_blob(self, data: bytes) -> str:
        """Make a blob fetchable; returns its digest."""
        ...
