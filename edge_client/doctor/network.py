"""The broker: can it be reached, does it take us, how large may a packet be."""

from __future__ import annotations

import fcntl
import secrets
import time
from pathlib import Path
from typing import NamedTuple

from edge_client.doctor.findings import Findings, error, ok, warning
from wire_protocol.errors import MusplitError
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.mqtt import Address, Link, TlsFiles
from wire_protocol.topics import Topics


class Contact(NamedTuple):
    """Whom to call, as `musplit device` would."""

    address: Address
    tls: TlsFiles | None
    fleet: str
    connect_s: float
    state: Path  # of the device program, or the folder above


def check_broker(contact: Contact) -> Findings:
    """Connect once.

    Without TLS as a client of its own. With TLS the broker names a client after its certificate: a
    device program that runs would lose its place, so it is left alone.
    """
    if contact.tls is not None and (busy := _in_use(contact.state)) is not None:
        yield ok("broker", f"not asked: a device program runs with {busy} and has the connection")
        return
    began_s = time.monotonic()
    try:
        link = Link(
            f"{contact.fleet}/doctor-{secrets.token_hex(4)}", contact.address,
            subscriptions=(Topics(contact.fleet).broadcast,), tls=contact.tls,
        )  # fmt: skip
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


def _in_use(state: Path) -> Path | None:
    """The state folder of a device program that runs now."""
    for path in (state / "lock", *state.glob("*/lock")):
        try:
            with path.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return path.parent
        except OSError:
            continue
    return None
