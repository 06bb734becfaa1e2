"""The link to a broker, against what only a scripted peer does on demand."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from wire_support import Script, Server, free_address, read_packet, wait_for, welcome

import wire_protocol.mqtt
from wire_protocol.errors import TransportError
from wire_protocol.mqtt import Address, Connected, Disconnected, Link, LinkEvent, Received

Serve = Callable[[Script], Server]
Opened = Callable[[Server], Link]
MARGIN_S = 4.0  # the network thread looks up once a second, and each version has one


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(script: Script) -> Server:
            server = Server(script)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def opened() -> Iterator[Callable[[Server], Link]]:
    """Opens links, whose Connected event is taken, and closes them."""
    with ExitStack() as stack:

        def start(server: Server) -> Link:
            link = Link("a", server.address, subscriptions=["x"])
            stack.callback(link.close, 0.0)
            link.open(5)
            assert link.next_event(1) == Connected()
            return link

        yield start


def never_answers(connection: socket.socket, _number: int) -> None:
    while connection.recv(4096):
        pass


def answers_with(data: bytes) -> Script:
    def script(connection: socket.socket, number: int) -> None:
        connection.recv(4096)
        connection.sendall(data)
        never_answers(connection, number)

    return script


def hangs_up(connection: socket.socket, _number: int) -> None:
    connection.recv(4096)
    connection.close()


STRANGERS = {
    "silence": never_answers,
    "end of stream": hangs_up,
    "HTTP": answers_with(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    "bytes of 0": answers_with(bytes(100)),
    "CONNACK with broken properties": answers_with(b"\x20\x05\x00\x00\x02\xff\xff"),
    "PUBLISH on a topic that is no UTF-8": answers_with(b"\x30\x06\x00\x02\xff\xfe\x00x"),
    "refusal": answers_with(b"\x20\x03\x00\x87\x00"),
}


@pytest.mark.parametrize("script", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_port_that_is_no_broker_is_an_error_of_one_line(serve: Serve, script: Script) -> None:
    assert_open_fails(serve(script).address)


def test_a_dead_port_is_an_error_of_one_line() -> None:
    assert_open_fails(free_address())


def assert_open_fails(
    address: Address, *, timeout_s: float = 0.5, match: str | None = None
) -> None:
    link = Link("a", address, subscriptions=["x"])
    began_s = time.monotonic()
    with pytest.raises(TransportError, match=match) as caught:
        link.open(timeout_s)
    assert time.monotonic() - began_s < timeout_s + MARGIN_S
    assert str(address) in str(caught.value)
    assert "\n" not in str(caught.value)
    link.close()


def test_a_second_client_with_the_same_id_is_fatal(
    serve: Serve, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first does not come back to steal the session in its turn."""
    monkeypatch.setattr(wire_protocol.mqtt, "_RECONNECT_MAX_S", (0.5, 1.0))

    def script(connection: socket.socket, _number: int) -> None:
        welcome(connection)
        connection.sendall(b"\xe0\x02\x8e\x00")  # DISCONNECT: session taken over
        connection.close()

    server = serve(script)
    event = opened(server).next_event(5)
    assert event == Disconnected("another client connected with the same id, 'a'", fatal=True)
    assert not wait_for(lambda: server.connections > 1, timeout_s=2.5)


def test_a_lost_link_is_told_also_after_a_reconnect_was_refused_once(
    serve: Serve, opened: Opened
) -> None:
    """A broker that starts may say "unavailable" first; that must not silence later losses."""

    def script(connection: socket.socket, number: int) -> None:
        if number == 2:
            read_packet(connection)
            connection.sendall(b"\x20\x03\x00\x88\x00")
        else:
            welcome(connection)
            if number == 1:
                time.sleep(0.1)
        connection.close()

    link = opened(serve(script))
    seen: list[LinkEvent] = []
    assert wait_for(lambda: fill(seen, link) and seen.count(Connected()) == 2)
    assert (Connected(), Connected()) not in itertools.pairwise(seen)
    assert isinstance(seen[0], Disconnected)


def fill(seen: list[LinkEvent], link: Link) -> bool:
    while (event := link.next_event(0)) is not None:
        seen.append(event)
    return bool(seen)


def test_a_refused_subscription_is_fatal_and_fails_the_opening(serve: Serve) -> None:
    def script(connection: socket.socket, number: int) -> None:
        read_packet(connection)
        connection.sendall(b"\x20\x03\x00\x00\x00")
        _, body = read_packet(connection)
        connection.sendall(b"\x90\x04" + body[:2] + b"\x00\x87")  # not authorized
        never_answers(connection, number)

    assert_open_fails(serve(script).address, timeout_s=5.0, match="subscription refused")


BROKEN = {
    "topic that is no UTF-8": b"\x30\x07\x00\x02\xff\xfe\x00hi",
    "unknown property": b"\x30\x07\x00\x01x\x02\x7f\x00h",
    "unknown packet": b"\x00\x00",
    "length of 5 bytes": b"\x30\xff\xff\xff\xff\x01",
    "topic beyond the packet": b"\x30\x03\xff\xffx",
    "empty SUBACK": b"\x90\x00",
    "empty PUBACK": b"\x40\x00",
}


@pytest.mark.parametrize("packet", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_packet_does_not_end_the_link(serve: Serve, opened: Opened, packet: bytes) -> None:
    """Messages still arrive after it, on the same connection or on the next."""

    def script(connection: socket.socket, number: int) -> None:
        welcome(connection)
        if number == 1:
            connection.sendall(packet)
        connection.sendall(b"\x30\x06\x00\x01x\x00hi")
        never_answers(connection, number)

    link = opened(serve(script))
    seen: list[LinkEvent] = []
    assert wait_for(lambda: fill(seen, link) and Received("x", b"hi") in seen, timeout_s=5)


def takes_no_publish(limit: int, *, farewell: bytes = b"") -> Script:
    """A broker that cuts a connection at a PUBLISH above a limit that it does not tell."""

    def script(connection: socket.socket, _number: int) -> None:
        welcome(connection)
        while True:
            kind, body = read_packet(connection)
            if kind & 0xF0 == 0x30 and len(body) > limit:
                connection.sendall(farewell)
                connection.close()
                return
            if kind & 0xF0 == 0x30:
                begin = 2 + int.from_bytes(body[:2], "big")
                connection.sendall(b"\x40\x02" + body[begin : begin + 2])
            elif not kind:
                return

    return script


@pytest.mark.parametrize("farewell", [b"", b"\xe0\x02\x95\x00"], ids=["silently", "saying so"])
def test_a_broker_that_cuts_the_connection_for_size_is_named_within_two_attempts(
    serve: Serve, opened: Opened, farewell: bytes
) -> None:
    server = serve(takes_no_publish(1000, farewell=farewell))
    link = opened(server)
    link.publish("x", b"small")
    link.publish("x", bytes(5000))
    seen: list[LinkEvent] = []
    assert wait_for(lambda: fill(seen, link) and getattr(seen[-1], "fatal", False))
    assert isinstance(seen[-1], Disconnected)
    for part in (str(server.address), "5000 bytes", "max_packet_size", "--packet-limit"):
        assert part in seen[-1].reason
    assert server.connections == (1 if farewell else 2)


def test_a_broker_that_dies_with_a_message_under_way_is_not_blamed(
    serve: Serve, opened: Opened
) -> None:
    """Once, or each time with another message: that is a broken broker, not a large message."""

    def script(connection: socket.socket, number: int) -> None:
        welcome(connection)
        _, body = read_packet(connection)
        begin = 2 + int.from_bytes(body[:2], "big")
        if number > 1:
            connection.sendall(b"\x40\x02" + body[begin : begin + 2])
            read_packet(connection)
        connection.close()

    link = opened(serve(script))
    seen: list[LinkEvent] = []
    for number in range(3):
        link.publish("x", bytes(5000 + number))
        assert wait_for(lambda n=number: fill(seen, link) and seen.count(Connected()) > n)
    assert not any(getattr(event, "fatal", False) for event in seen)
