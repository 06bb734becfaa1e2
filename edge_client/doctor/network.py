"""The broker: can it be reached, does it take us, how large may a packet be."""

from __future__ import annotations

import secrets
import time

from edge_client.doctor.findings import Findings, error, ok, warning
from wire_protocol.errors import MusplitError
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.mqtt import Address, Link, TlsFiles
from wire_protocol.topics import Topics


class Contact:
    """Whom to call, as `musplit device` would."""

    def __init__(
        self, address: Address, tls: TlsFiles | None, fleet: str, connect_s: float
    ) -> None:
        self.address, self.tls, self.fleet, self.connect_s = address, tls, fleet, connect_s


def check_broker(contact: Contact) -> Findings:
    """Connect once, as a client of its own: a device program that runs stays connected."""
    link = Link(
        f"{contact.fleet}/doctor-{secrets.token_hex(4)}", contact.address,
        subscriptions=(Topics(contact.fleet).broadcast,), tls=contact.tls,
    )  # fmt: skip
    began_s = time.monotonic()
    try:
        link.open(contact.connect_s)
    except MusplitError as failure:
        what, _, remedy = str(failure).partition("; ")
        yield error(
            "broker", what, "the device gets its rounds through the broker",
            remedy or "start it (musplit broker), check host, port, cable and firewall",
        )  # fmt: skip
        return
    seconds, limit, protocol = time.monotonic() - began_s, link.packet_limit, link.protocol
    link.close()
    how = " over TLS 1.3" if contact.tls else ""
    yield ok("broker", f"{contact.address} by MQTT {protocol}{how} in {seconds:.2f} s")
    if limit is not None:
        parts = ": larger messages go in parts" if limit < MAX_FRAME_BYTES else ""
        yield ok("packet-limit", f"{limit} bytes{parts}")
    elif protocol == "5":
        yield ok("packet-limit", "none told, so none by MQTT 5")
    else:
        yield warning(
            "packet-limit", f"MQTT {protocol} brokers cannot tell one",
            "a broker that takes less than a frame cuts the connection without a reason",
            "use a broker of MQTT 5, or give musplit device --packet-limit BYTES",
        )  # fmt: skip
