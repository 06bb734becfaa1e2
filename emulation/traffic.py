"""Bytes that simulated devices would move: payloads as they are, MQTT's share by its packet format.

Counted is the TCP stream, as on a real device: PUBLISH at QoS 1 and its PUBACK (MQTT 5, sections
3.3 and 3.4), without properties. Not counted: CONNECT, SUBSCRIBE, pings, the splitting of messages
above a packet limit, and what a lossy link repeats.
"""

from __future__ import annotations

from typing import Final

from server_node.recorder import Traffic

# Fixed header 2, packet identifier 2; a success needs no reason code.
PUBACK_BYTES: Final = 4


def publish_bytes(topic: str, payload_bytes: int) -> int:
    """A PUBLISH: fixed header, remaining length, topic, packet id, property length, payload."""
    rest = 2 + len(topic) + 2 + 1 + payload_bytes
    return 1 + max(1, -(-rest.bit_length() // 7)) + rest


class CountedTraffic(Traffic):
    """What the simulation counted itself, in the place of the devices' reports."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = 0
        self.bundle_down = 0

    def sent(self, size_bytes: int, times: int = 1) -> None:
        """So many messages of devices to the server, acknowledged."""
        self.up += size_bytes * times
        self.down += PUBACK_BYTES * times

    def received(self, size_bytes: int, times: int = 1) -> None:
        """So many messages of the server to devices, acknowledged."""
        self.down += size_bytes * times
        self.up += PUBACK_BYTES * times

    def totals(self) -> dict[str, int]:
        """See Traffic."""
        return {
            "bytes_up": self.up,
            "bytes_down": self.down,
            "bundle_bytes_up": 0,
            "bundle_bytes_down": self.bundle_down,
        }
