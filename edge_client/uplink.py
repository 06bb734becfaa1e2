"""What a device says, on its own topics: typed messages and frames. Counts the run's bytes."""

from __future__ import annotations

from importlib.metadata import version

from edge_client.fetching import Bytes
from edge_client.power.phases import RADIO, WAIT, Stopwatch
from edge_client.shard import Shard
from edge_client.trainer import Trainer
from wire_protocol.messages import Join, Leave, Ready, UpMessage, encode
from wire_protocol.mqtt import LinkLike
from wire_protocol.topics import PROTOCOL_VERSION, Topics


class Uplink:
    """Of one start of a device program, which `epoch` names.

    Whatever sends raises QueueFullError or TransportError.
    """

    def __init__(
        self, link: LinkLike, fleet: str, device_id: str, epoch: int, stopwatch: Stopwatch
    ) -> None:
        topics = Topics(fleet)
        self._link, self._stopwatch, self._epoch = link, stopwatch, epoch
        self._control, self._frames = topics.control(device_id), topics.frame(device_id)
        self._run_began: Bytes = (0, 0)

    def stream(self) -> Bytes:
        """Bytes of the link since it was made, up and down."""
        return self._link.bytes_up, self._link.bytes_down

    def count_anew(self) -> None:
        """The next run's bytes count from here."""
        self._run_began = self.stream()

    def send(self, message: UpMessage) -> None:
        """Queue a message."""
        self._publish(self._control, encode(message))

    def send_frame(self, payload: bytes) -> None:
        """Queue an encoded frame."""
        self._publish(self._frames, payload)

    def join(self, shard: Shard) -> None:
        """Ask to take part."""
        own = version("musplit")
        self.send(Join(self._epoch, PROTOCOL_VERSION, own, shard.shard_index, shard.samples))

    def leave(self, reason: str) -> None:
        """Say goodbye (best effort)."""
        self.send(Leave(self._epoch, reason))

    def ready(self, trainer: Trainer) -> None:
        """Tell where the device stands."""
        self.send(Ready(trainer.welcome.run, self._epoch, trainer.next_round))

    def run_bytes(self) -> Bytes:
        """Bytes of the run so far, up and down."""
        now, began = self.stream(), self._run_began
        return now[0] - began[0], now[1] - began[1]

    def _publish(self, topic: str, payload: bytes) -> None:
        self._stopwatch.enter(RADIO)
        self._link.publish(topic, payload)
        self._stopwatch.enter(WAIT)
