"""The link to a broker, against real ones: mosquitto (MQTT 5) and amqtt (MQTT 3.1.1)."""

from __future__ import annotations

import inspect
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from wire_support import (
    MOSQUITTO,
    BrokerProcess,
    CountingProxy,
    wait_for,
)

from wire_protocol.errors import TransportError
from wire_protocol.mqtt import Address, Connected, Disconnected, Link, LinkEvent, Received, Will

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
KINDS = [pytest.param("mosquitto", marks=needs_mosquitto), "amqtt"]
PROTOCOLS = {"mosquitto": "5", "amqtt": "3.1.1"}
MARGIN_S = 2.0  # the network thread looks up once a second


class Bench:
    """Starts brokers, servers and links, and ends them all."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack

    def broker(self, kind: str = "mosquitto", extra: str = "") -> BrokerProcess:
        broker = BrokerProcess(kind, self._folder, extra)
        broker.start()
        self._stack.callback(broker.kill)
        return broker

    def proxy(self, target: Address) -> CountingProxy:
        proxy = CountingProxy(target)
        self._stack.callback(proxy.close)
        return proxy

    def link(self, address: Address, *, name: str = "a", will: Will | None = None) -> Link:
        """An open link, subscribed to in/#, whose Connected event is taken."""
        link = Link(name, address, subscriptions=["in/#"], will=will)
        link.open(20)
        self._stack.callback(link.close, 0.0)
        assert link.next_event(1) == Connected()
        return link


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def until(link: Link, wanted: type, timeout_s: float = 20.0) -> LinkEvent:
    """The next event of a type, skipping others."""
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        event = link.next_event(left_s)
        if isinstance(event, wanted):
            return event
    pytest.fail(f"no {wanted.__name__} within {timeout_s} s")


@pytest.mark.parametrize("kind", KINDS)
def test_messages_and_subscriptions_survive_a_killed_broker(bench: Bench, kind: str) -> None:
    """By MQTT 5 where the broker speaks it; what is published while it is away arrives later."""
    broker = bench.broker(kind)
    link = bench.link(broker.address)
    assert link.protocol == PROTOCOLS[kind]
    payload = bytes(range(256)) * 100
    link.publish("in/x", payload)
    assert link.next_event(5) == Received("in/x", payload)
    assert link.next_event(0) is None

    broker.kill()
    event = link.next_event(5)
    assert isinstance(event, Disconnected)
    assert not event.fatal
    link.publish("in/offline", b"waited")
    broker.start()
    assert until(link, Connected) == Connected()
    assert until(link, Received) == Received("in/offline", b"waited")
    link.publish("in/y", b"again")
    assert until(link, Received) == Received("in/y", b"again")


@pytest.mark.parametrize("kind", KINDS)
def test_the_byte_counts_are_those_of_the_tcp_streams(bench: Bench, kind: str) -> None:
    """Also over the step down to MQTT 3.1.1, and over a reconnect."""
    proxy = bench.proxy(bench.broker(kind).address)
    link = bench.link(proxy.address)

    def agree() -> bool:
        return (link.bytes_up, link.bytes_down) == (proxy.bytes_up, proxy.bytes_down)

    for size in (0, 10, 100_000):
        link.publish("in/x", bytes(size))
        assert until(link, Received) == Received("in/x", bytes(size))
    assert wait_for(agree), f"{link.bytes_up, link.bytes_down} {vars(proxy)}"
    assert link.bytes_up > 100_010
    assert link.bytes_down > 100_010

    before = link.bytes_up
    time.sleep(0.3)  # the last acknowledgements pass
    proxy.hang_up()
    until(link, Connected)
    link.publish("in/x", b"after")
    until(link, Received)
    assert wait_for(agree)
    assert link.bytes_up > before
    link.close()
    assert wait_for(agree), "the farewell is counted too"


@pytest.mark.parametrize("kind", KINDS)
def test_nagles_delay_is_off(bench: Bench, kind: str) -> None:
    link = bench.link(bench.broker(kind).address)
    sock = link._client.socket()
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


_WILLING = """
import sys, time
from wire_protocol.mqtt import Address, Link, Will
link = Link("doomed", Address("127.0.0.1", int(sys.argv[1])), subscriptions=["x"],
            will=Will("in/will", b"gone"))
link.open(20)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_will_speaks_for_a_killed_process(bench: Bench, kind: str) -> None:
    broker = bench.broker(kind)
    link = bench.link(broker.address)
    command = [sys.executable, "-c", _WILLING, str(broker.address.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        finally:
            process.kill()
    assert link.next_event(10) == Received("in/will", b"gone")


@needs_mosquitto
def test_a_closed_link_sends_what_is_queued_and_leaves_no_will(bench: Bench) -> None:
    broker = bench.broker()
    link = bench.link(broker.address)
    other = bench.link(broker.address, name="b", will=Will("in/will", b"gone"))
    for number in range(50):
        other.publish(f"in/{number}", bytes(20_000))
    other.close()
    received = [until(link, Received) for _ in range(50)]
    assert sorted(event.topic for event in received) == sorted(f"in/{n}" for n in range(50))
    assert link.next_event(0.5) is None


@needs_mosquitto
def test_a_message_beyond_the_brokers_limit_is_refused_by_its_name(bench: Bench) -> None:
    link = bench.link(bench.broker(extra="max_packet_size 20000").address)
    with pytest.raises(TransportError, match=r"20000 bytes.*max_packet_size"):
        link.publish("in/x", bytes(20_000))
    link.publish("in/x", bytes(19_900))
    assert link.next_event(5) == Received("in/x", bytes(19_900))


@needs_mosquitto
def test_an_endless_queue_is_refused_while_the_broker_is_away(bench: Bench) -> None:
    broker = bench.broker()
    link = bench.link(broker.address)
    broker.kill()
    assert isinstance(link.next_event(5), Disconnected)
    with pytest.raises(TransportError, match="too slowly"):
        publish_many(link, 10_000)


def publish_many(link: Link, count: int) -> None:
    for _ in range(count):
        link.publish("in/x", b"")


@needs_mosquitto
def test_closing_takes_no_longer_than_the_flush_when_the_broker_stalls(bench: Bench) -> None:
    broker = bench.broker()
    link = bench.link(broker.address)
    broker.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(4):
            link.publish("in/x", bytes(8 << 20))  # more than the sockets' buffers take
        began_s = time.monotonic()
        link.close(flush_s=0.5)
        assert time.monotonic() - began_s < 0.5 + MARGIN_S
    finally:
        broker.process.send_signal(signal.SIGCONT)


@needs_mosquitto
def test_opening_waits_for_a_broker_that_starts_late(tmp_path: Path) -> None:
    broker = BrokerProcess("mosquitto", tmp_path)
    link = Link("a", broker.address, subscriptions=["x"])
    timer = threading.Timer(0.7, broker.start)
    timer.start()
    try:
        link.open(20)
        assert link.next_event(1) == Connected()
        link.close()
    finally:
        timer.join()
        broker.kill()


def test_paho_still_has_what_the_link_overrides() -> None:
    """Byte counts and flushing rest on paho's private names: a change there must be loud."""
    for name, parameter in (("_sock_send", "buf"), ("_sock_recv", "bufsize")):
        method = getattr(paho.Client, name)
        assert list(inspect.signature(method).parameters) == ["self", parameter]
    raw = name_of_raw_calls()
    assert raw == {"_sock_send", "_sock_recv"}, "paho uses its socket elsewhere: bytes go uncounted"
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    assert len(client._out_messages) == 0
    client.publish("x", b"", qos=1)
    assert len(client._out_messages) == 1


def name_of_raw_calls() -> set[str]:
    """Methods of paho's client that read or write its socket themselves."""
    return {
        name
        for name, method in inspect.getmembers(paho.Client, inspect.isfunction)
        if re.search(
            r"_sock\.(send|sendall|recv|recv_into|read|write)\(", inspect.getsource(method)
        )
    }
