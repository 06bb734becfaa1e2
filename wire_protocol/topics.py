"""The topic tree, in one place.

musplit/1/<fleet>/bcast                 server -> every device (control messages)
musplit/1/<fleet>/dev/<id>/down         server -> one device   (control messages)
musplit/1/<fleet>/dev/<id>/up/control   device -> server       (control messages, the last will)
musplit/1/<fleet>/dev/<id>/up/frame     device -> server       (tensor frames)

The 1 is the topic tree's version; it stays when PROTOCOL_VERSION grows, so that a device of another
version still hears why it is refused. A device's identity is the topic it publishes on, so a
broker's access list can bind it; nothing in a payload can claim another identity.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from wire_protocol.errors import InputError

PROTOCOL_VERSION: Final = 4
_TREE_VERSION: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_name(name: str, what: str) -> str:
    """Return `name` when it can stand in a topic and a file name; raise InputError otherwise."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{what} {name!r}: use 1 to 64 letters, digits, '-', '_' or '.', "
            "starting with a letter or digit"
        )
    return name


class Uplink(NamedTuple):
    """A parsed uplink topic: who published, and which kind of payload."""

    device_id: str
    is_frame: bool


class Topics(NamedTuple):
    """The topics of one fleet."""

    fleet: str

    @property
    def root(self) -> str:
        """Everything of this fleet lies below it."""
        return f"musplit/{_TREE_VERSION}/{self.fleet}"

    @property
    def broadcast(self) -> str:
        """Server to every device."""
        return f"{self.root}/bcast"

    @property
    def all_uplinks(self) -> tuple[str, str]:
        """The two filters that the server subscribes to."""
        return self.control("+"), self.frame("+")

    def down(self, device_id: str) -> str:
        """Server to one device."""
        return f"{self.root}/dev/{device_id}/down"

    def control(self, device_id: str) -> str:
        """One device's control messages."""
        return f"{self.root}/dev/{device_id}/up/control"

    def frame(self, device_id: str) -> str:
        """One device's tensor frames."""
        return f"{self.root}/dev/{device_id}/up/frame"

    def parse_uplink(self, topic: str) -> Uplink | None:
        """The uplink named by `topic`, or None when it is not one of this fleet's."""
        prefix = f"{self.root}/dev/"
        if not topic.startswith(prefix):
            return None
        parts = topic[len(prefix) :].split("/")
        if len(parts) != 3 or parts[1] != "up" or parts[2] not in ("control", "frame"):
            return None
        return Uplink(parts[0], parts[2] == "frame") if _NAME.fullmatch(parts[0]) else None
