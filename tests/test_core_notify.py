"""What the device program tells the service manager that started it; in a run: test_e2e_board."""

from __future__ import annotations

import os
import socket
import time

import pytest

from edge_client.notify import Notifier


@pytest.fixture
def manager(tmp_path):
    """A datagram socket where systemd would listen, and what came."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(0.2)
        yield str(tmp_path / "notify"), lambda: _received(listener)


def _received(listener):
    messages = []
    while True:
        try:
            messages.append(listener.recv(100).decode())
        except TimeoutError:
            return messages


def test_signs_of_life_are_sent_a_few_times_per_watchdog_period(manager):
    address, received = manager
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000"})
    notifier.ready()
    end_s = time.monotonic() + 0.35
    while time.monotonic() < end_s:
        notifier.alive()
    messages = received()
    assert messages[0] == "READY=1"
    assert messages[1:] == ["WATCHDOG=1"] * 3


def test_without_a_watchdog_only_readiness_is_told(manager):
    address, received = manager
    for variables in ({}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid() + 1)}):
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, **variables})
        notifier.ready()
        time.sleep(0.01)
        notifier.alive()
    assert received() == ["READY=1", "READY=1"]


def test_nobody_listening_is_no_error(tmp_path):
    for address in ("", str(tmp_path / "nobody"), "@musplit-nobody"):
        notifier = Notifier(address, 0.001)
        notifier.ready()
        time.sleep(0.002)
        notifier.alive()
