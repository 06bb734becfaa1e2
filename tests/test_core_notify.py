"""What the device program tells the service manager that started it."""

from __future__ import annotations

import os
import socket
import time

import pytest
from harness import TINY, Bench, make_shards

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


def test_a_device_says_ready_when_the_broker_has_answered_and_then_stays_alive(manager, tmp_path):
    address, received = manager
    config = {**TINY, "devices.count": 1, "run.rounds": 2}
    with Bench(tmp_path / "bench") as bench:
        broker = bench.broker()
        (shard,) = make_shards(tmp_path / "shards", 1)
        device = bench.device(
            "pi-1", broker, shard, env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"}
        )
        device.wait_for("connected to")
        server = bench.serve(broker, tmp_path / "run", config)
        assert server.finish() == 0, server.stderr
        device.finish(15.0)
    messages = received()
    assert messages[0] == "READY=1"
    assert messages.count("WATCHDOG=1") > 3
