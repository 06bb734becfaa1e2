"""The links of a virtual fleet: what messages weigh, and when those of the server arrive.

What devices send while they compute is counted when it arrives, by the fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from emulation.delays import Delays
from emulation.traffic import CountedTraffic, publish_bytes
from wire_protocol.energy import NoEnergy
from wire_protocol.messages import (
    CHUNK_BYTES,
    DownMessage,
    Join,
    Ready,
    Report,
    Snapshot,
    UpMessage,
    Welcome,
    encode,
)
from wire_protocol.topics import PROTOCOL_VERSION, Topics

# Of a chunk beside its data: envelope, digest, index.
_CHUNK_EXTRA_BYTES: Final = 120


class VirtualLinks:
    """One for each of the devices `names`, with the topics of a real one. Down, it is a queue."""

    def __init__(
        self, fleet: str, names: Sequence[str], run: int, delays: Delays,
        read_clock_s: Callable[[], float],
    ) -> None:  # fmt: skip
        self._names = names
        self.traffic = CountedTraffic()
        self._topics, self._delays, self._read_clock_s = Topics(fleet), delays, read_clock_s
        self._free_s: dict[int, float] = {}
        self._broadcast = (0.0, 0)  # when, and how many bytes then
        self._report_bytes = self.control_bytes(0, _typical_report(run))
        self._ready_bytes = self.control_bytes(0, Ready(run, 0, 0))

    # -- up ----------------------------------------------------------------------------------

    def control_bytes(self, device: int, message: UpMessage) -> int:
        """What a device's message weighs."""
        return publish_bytes(self._topics.control(self._names[device]), len(encode(message)))

    def frame_bytes(self, device: int, payload: bytes) -> int:
        """What a device's frame weighs."""
        return publish_bytes(self._topics.frame(self._names[device]), len(payload))

    def ready_arrives_s(self, device: int, said_s: float) -> float:
        """When the server hears that a device is ready for other work."""
        return said_s + self._delays.up_s(device, self._ready_bytes)

    def count_ready(self) -> None:
        """A device has said so."""
        self.traffic.sent(self._ready_bytes)

    def count_reports(self, devices: int) -> None:
        """So many devices have told what a commit cost them."""
        self.traffic.sent(self._report_bytes, devices)

    def handshake(self, device: int, samples: int, welcome: Welcome) -> None:
        """Join, welcome, ready."""
        said: list[UpMessage] = [
            Join(0, PROTOCOL_VERSION, "", device, samples), Ready(welcome.run, 0, 0),
        ]  # fmt: skip
        for message in said:
            self.traffic.sent(self.control_bytes(device, message))
        self.traffic.received(self._down_bytes(device, encode(welcome)))

    # -- down --------------------------------------------------------------------------------

    def broadcast(self, message: DownMessage, devices: int) -> None:
        """To all devices that are there; what is broadcast at once arrives at once."""
        size_bytes = publish_bytes(self._topics.broadcast, len(encode(message)))
        self.traffic.received(size_bytes, devices)
        now_s = self._read_clock_s()
        at_s, earlier_bytes = self._broadcast
        self._broadcast = (now_s, size_bytes + (earlier_bytes if at_s == now_s else 0))

    def broadcast_arrives_s(self, device: int) -> float:
        """When a device has all that was broadcast now, and what its link had to bring before."""
        at_s, broadcast_bytes = self._broadcast
        now_s = self._read_clock_s()
        down_s = self._delays.down_s(device, broadcast_bytes if at_s == now_s else 0)
        return max(now_s, self._free_s.get(device, 0.0)) + down_s

    def send(self, device: int, message: DownMessage) -> float:
        """A message to a device, and the snapshot that it names; returns when it arrives."""
        size_bytes = self._down_bytes(device, encode(message))
        self.traffic.received(size_bytes)
        if isinstance(message, Snapshot):
            chunks = -(-message.size_bytes // CHUNK_BYTES)
            size_bytes += message.size_bytes + chunks * _CHUNK_EXTRA_BYTES
            self.traffic.received(_CHUNK_EXTRA_BYTES, chunks)
            self.traffic.down += message.size_bytes
        return self._bring(device, size_bytes)

    def send_frame(self, device: int, payload: bytes) -> float:
        """A frame to a device; returns when it arrives."""
        size_bytes = self._down_bytes(device, payload)
        self.traffic.received(size_bytes)
        return self._bring(device, size_bytes)

    def bring_bundle(self, size_bytes: int) -> None:
        """Every device has fetched a bundle."""
        chunks = -(-size_bytes // CHUNK_BYTES)
        each_bytes = size_bytes + chunks * _CHUNK_EXTRA_BYTES
        self.traffic.bundle_down = len(self._names) * each_bytes

    def _down_bytes(self, device: int, payload: bytes) -> int:
        return publish_bytes(self._topics.down(self._names[device]), len(payload))

    def _bring(self, device: int, size_bytes: int) -> float:
        """When a message that is sent now has crossed a device's link."""
        free_s = max(self._read_clock_s(), self._free_s.get(device, 0.0))
        arrives_s = free_s + self._delays.down_s(device, size_bytes)
        self._free_s[device] = arrives_s - self._delays.latency_s
        return arrives_s


def _typical_report(run: int) -> Report:
    """As large as most are: its times take nine bytes each, whatever they say."""
    return Report(
        run=run, epoch=1 << 40, round=1 << 10, started_unix_s=0.5, perturb_s=0.5, forward_s=0.5,
        encode_s=0.5, wait_s=0.5, replay_s=0.5, bytes_up=1 << 20, bytes_down=1 << 20,
        bundle_bytes_up=1 << 10, bundle_bytes_down=1 << 17, rss_bytes=1 << 26,
        peak_rss_bytes=1 << 26, energy=NoEnergy("virtual"),
    )  # fmt: skip
