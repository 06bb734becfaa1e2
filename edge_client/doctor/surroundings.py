"""The second part of the checks: room, power, clock, certificates, broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from edge_client.doctor.clock import check_clock, check_skew
from edge_client.doctor.diagnose import guarded
from edge_client.doctor.findings import Board, Finding, Findings
from edge_client.doctor.network import Contact, check_broker
from edge_client.doctor.power import check_power
from edge_client.doctor.resources import check_disk, check_memory
from wire_protocol.events import Address
from wire_protocol.tls import TlsFiles


class Questions(NamedTuple):
    """What to check beside the board itself; None: not asked."""

    state: Path
    broker: Address | None
    tls: TlsFiles | None
    url: str | None
    fleet: str
    connect_s: float


def diagnose_surroundings(board: Board, asked: Questions) -> Iterator[Finding]:
    """Every finding, as soon as it is known."""
    yield from guarded("memory", lambda: check_memory(board))
    yield from guarded("disk", lambda: check_disk(asked.state))
    yield from guarded("power", lambda: check_power(board))
    yield from guarded("clock", lambda: check_clock(board, time.time()))
    url, tls, broker = asked.url, asked.tls, asked.broker
    if url is not None:
        yield from guarded("clock-skew", lambda: check_skew(url, tls.ca if tls else None))
    if tls is not None:
        yield from guarded("identity", lambda: _certificates(tls))
    if broker is not None:
        contact = Contact(broker, tls, asked.fleet, asked.connect_s, asked.state)
        yield from guarded("broker", lambda: check_broker(contact))


def _certificates(tls: TlsFiles) -> Findings:
    from edge_client.doctor.certificates import check_certificates  # noqa: PLC0415 - cryptography

    return check_certificates(tls, datetime.now(UTC))
