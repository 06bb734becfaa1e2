"""The link to a broker, against real ones: mosquitto (MQTT 5) and amqtt (MQTT 3.1.1)."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from wire_support import (
    MOSQUITTO,
    BrokerProcess,
    CountingProxy,
    wait_for,
)

from emulation.link import LinkShape, shaped_links
from wire_protocol.errors import TransportError
from wire_protocol.mqtt import Address, Connected, Disconnected, Link, LinkEvent, Received, Will
from wire_protocol.parts import split

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
def test_a_message_may_take_longer_than_the_keep_alive(
    bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link of 64 kbit/s: 40 kB take 5 s, and the answer to a ping comes after them."""
    monkeypatch.setattr("wire_protocol.mqtt._KEEPALIVE_S", 1)
    shape = LinkShape(64e3, 64e3)
    with shaped_links([shape], bench.broker(kind).address, 0) as (way,):
        link = bench.link(way)
        link.publish("out/x", random.Random(1).randbytes(40_000))
        begin_s = time.monotonic()
        assert wait_for(lambda: link.backlog == 0, 20.0)
        assert time.monotonic() - begin_s > 4.0
        assert link.next_event(0) is None  # the connection held
        link.close(0.0)


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
    assert wait_for(lambda: link.backlog == 0)  # what is not acknowledged comes once more

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 1000, 131_072, 1_000_001, 8 << 20])
def test_every_size_arrives_as_it_was_sent(bench: Bench, kind: str, size: int) -> None:
    """And is acknowledged: nothing is delivered again, nothing waits."""
    link = bench.link(bench.broker(kind).address)
    payload = random.Random(size).randbytes(size)
    for _ in range(2):
        link.publish("in/x", payload)
    for _ in range(2):
        event = until(link, Received, 60.0)
        assert isinstance(event, Received)
        assert event.topic == "in/x"
        assert event.payload == payload
    assert wait_for(lambda: link.backlog == 0)
    assert link.next_event(0.2) is None
    assert not link.chunked


@needs_mosquitto
@pytest.mark.parametrize("limit", [600, 20_000])
def test_a_message_beyond_the_brokers_limit_goes_in_parts(bench: Bench, limit: int) -> None:
    """At the limit nothing is cut; mosquitto counts what comes after the fixed header."""
    link = bench.link(bench.broker(extra=f"max_packet_size {limit}").address)
    assert link.packet_limit == limit
    around = len("in/x") + 10
    for size in (limit - around, limit - around + 1, limit * 3, 200_000):
        payload = random.Random(size).randbytes(size)
        link.publish("in/x", payload)
        assert until(link, Received) == Received("in/x", payload)
        assert link.chunked == (size > limit - around)


@needs_mosquitto
def test_parts_that_were_lost_come_with_the_message_sent_again(bench: Bench) -> None:
    """Over a lost connection of the receiver too."""
    broker = bench.broker(extra="max_packet_size 1000")
    proxy = bench.proxy(broker.address)
    receiver = bench.link(proxy.address)
    sender = bench.link(broker.address, name="b")
    message = random.Random(0).randbytes(5000)
    pieces = split(message, 900)
    assert pieces
    for piece in pieces[:-2]:
        sender.publish("in/x", piece)
    assert wait_for(lambda: receiver._joiner.held_bytes > 3000)
    proxy.hang_up()
    until(receiver, Connected)
    for piece in pieces[-2:]:
        sender.publish("in/x", piece)
    assert until(receiver, Received) == Received("in/x", message)


@needs_mosquitto
def test_a_limit_of_ones_own_acts_where_the_broker_tells_none(bench: Bench) -> None:
    address = bench.broker().address
    link = Link("a", address, subscriptions=["in/#"], packet_limit=1000)
    link.open(20)
    assert link.next_event(1) == Connected()
    assert link.packet_limit == 1000
    link.publish("in/x", bytes(5000))
    assert until(link, Received) == Received("in/x", bytes(5000))
    assert link.chunked
    link.close()


@needs_mosquitto
def test_a_limit_below_one_header_is_an_error_that_names_it(bench: Bench) -> None:
    address = bench.broker(extra="max_packet_size 100").address
    link = Link("a", address, subscriptions=["in/#"])
    with pytest.raises(TransportError, match=r"packets of 100 bytes.*512.*max_packet_size"):
        link.open(20)
    own = Link("a", address, subscriptions=["in/#"], packet_limit=511)
    with pytest.raises(TransportError, match=r"511 bytes.*512"):
        own.open(20)
    for one in (link, own):
        one.close()


@needs_mosquitto
def test_a_message_of_too_many_parts_is_refused_with_the_remedy(bench: Bench) -> None:
    link = bench.link(bench.broker(extra="max_packet_size 512").address)
    with pytest.raises(TransportError, match="too many parts"):
        link.publish("in/x", bytes(8 << 20))
    assert link.backlog == 0


@needs_mosquitto
def test_damaged_parts_are_handed_on_to_be_refused(bench: Bench) -> None:
    link = bench.link(bench.broker().address)
    link.publish("in/x", b"MUSP is no header")
    assert until(link, Received) == Received("in/x", b"MUSP is no header")


@needs_mosquitto
def test_links_come_back_at_different_times(bench: Bench) -> None:
    """A fleet must not return to a restarted broker all at once."""
    address = bench.broker().address
    clients = [bench.link(address, name=name)._client for name in "abc"]
    delays = {(client._reconnect_min_delay, client._reconnect_max_delay) for client in clients}
    assert len(delays) == 3


@needs_mosquitto
def test_an_endless_queue_is_refused_while_the_broker_is_away(bench: Bench) -> None:
    broker = bench.broker()
    link = bench.link(broker.address)
    broker.kill()
    assert isinstance(link.next_event(5), Disconnected)
    with pytest.raises(TransportError, match="too slowly"):
        publish_many(link, 20_000)


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
