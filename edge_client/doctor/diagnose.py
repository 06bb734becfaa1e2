"""All checks in order. One that fails itself is a finding too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from edge_client.doctor.clock import check_clock, check_skew
from edge_client.doctor.findings import Board, Finding, Findings, error
from edge_client.doctor.power import check_power
from edge_client.doctor.probe import probe_runtime
from edge_client.doctor.resources import check_disk, check_memory
from edge_client.doctor.runtime import check_runtime, installed_version
from edge_client.doctor.system import check_system, this_system
from wire_protocol.events import Address
from wire_protocol.tls import TlsFiles

# An import takes a second on a board, and half a minute under an emulator.
_PROBE_LIMIT_S: Final = 180.0


class Questions(NamedTuple):
    """What to check beside the board itself; None: not asked."""

    state: Path
    broker: Address | None
    tls: TlsFiles | None
    url: str | None
    fleet: str
    connect_s: float


def diagnose(board: Board, asked: Questions) -> Iterator[Finding]:
    """Every finding, as soon as it is known."""
    system = this_system()
    yield from _guarded("system", lambda: check_system(board, system))
    installed = installed_version()
    # Before anything that starts threads: the probe forks.
    yield from _guarded(
        "onnxruntime",
        lambda: check_runtime(
            board, system.machine, installed,
            None if installed is None else probe_runtime(_PROBE_LIMIT_S),
        ),
    )  # fmt: skip
    yield from _guarded("memory", lambda: check_memory(board))
    yield from _guarded("disk", lambda: check_disk(asked.state))
    yield from _guarded("power", lambda: check_power(board))
    yield from _guarded("clock", lambda: check_clock(board, time.time()))
    tls = asked.tls
    if asked.url is not None:
        url, ca = asked.url, tls.ca if tls else None
        yield from _guarded("clock-skew", lambda: check_skew(url, ca))
    if tls is not None:
        yield from _guarded("identity", lambda: _certificates(tls))
    if asked.broker is not None:
        yield from _guarded("broker", lambda: _broker(asked))


def _certificates(tls: TlsFiles) -> Findings:
    from edge_client.doctor.certificates import check_certificates  # noqa: PLC0415 - cryptography

    return check_certificates(tls, datetime.now(UTC))


def _broker(asked: Questions) -> Findings:
    # numpy comes along, which may be what crashes: the probe tells first.
    from edge_client.doctor.network import Contact, check_broker  # noqa: PLC0415

    assert asked.broker is not None
    return check_broker(Contact(asked.broker, asked.tls, asked.fleet, asked.connect_s))


def _guarded(check: str, run: Callable[[], Findings]) -> Iterator[Finding]:
    try:
        yield from run()
    except Exception as failure:  # noqa: BLE001 - a check that fails must not hide the others
        yield error(
            check, f"could not be checked: {type(failure).__name__}: {failure}",
            "this is unexpected", "report it, with the output of musplit doctor --format json",
        )  # fmt: skip
