"""The link to a broker: bounded, self-reconnecting, on paho-mqtt 2 (see paho_client.py).

MQTT 5 first, 3.1.1 when the broker refuses it. QoS 1 always (paho's QoS 2 loses messages over a
broker restart), TCP_NODELAY always (without it a 100-byte exchange takes 44 ms), subscriptions
renewed on every connect (a restarted broker has forgotten them). Messages beyond the broker's
packet limit go in parts, which neither side notices.
"""

from __future__ import annotations

import queue
import random
import socket
import ssl
import time
from collections.abc import Sequence
from threading import Event, Lock
from typing import Any, Final

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from wire_protocol.errors import HeaderError, QueueFullError, TransportError
from wire_protocol.events import (
    Address,
    Connected,
    Disconnected,
    LinkEvent,
    LinkLike,
    Received,
    Will,
)
from wire_protocol.frames import MAX_FRAME_BYTES
from wire_protocol.mqtt_stream import Payload
from wire_protocol.paho_client import CountingClient
from wire_protocol.parts import MAX_PARTS, MIN_PACKET_BYTES, Joiner, is_part, split
from wire_protocol.tls import TlsFiles, explain

__all__ = [
    "DEFAULT_PORT", "DEFAULT_TLS_PORT", "MIN_PACKET_BYTES", "Address", "Connected", "Disconnected",
    "Link", "LinkEvent", "LinkLike", "Received", "TlsFiles", "Will",
]  # fmt: skip

DEFAULT_PORT: Final = 1883
DEFAULT_TLS_PORT: Final = 8883
_KEEPALIVE_S: Final = 15
# A peer that takes nothing of what is sent for so long is gone, whatever it still has to answer.
_UNTAKEN_S: Final = 120.0
_QOS: Final = 1
_EVENTS_QUEUED: Final = 512
_BYTES_QUEUED: Final = 256 << 20
_PACKETS_QUEUED: Final = MAX_PARTS
_MESSAGES_IN_FLIGHT: Final = 64
# Seconds before the first attempt to reconnect, and at most between two, both by chance: a fleet
# must not come back to a restarted broker all at once.
_RECONNECT_FIRST_S: Final = (0.3, 1.0)
_RECONNECT_MAX_S: Final = (6.0, 10.0)
# What goes around a payload: fixed header 5, topic length 2, packet id 2, properties 1 (MQTT 5).
_PUBLISH_BYTES: Final = 10
_FALLBACK_S: Final = 2.0
# Connections in a row that lasted less than this are what two clients with one id do to each other.
_SHORT_LIFE_S: Final = 3.0
_SHORT_LIVES: Final = 5


class Link:
    """A connection to the broker. Events are taken with `next_event` by a single consumer."""

    def __init__(
        self,
        client_id: str,
        address: Address,
        *,
        subscriptions: Sequence[str],
        will: Will | None = None,
        max_payload_bytes: int = MAX_FRAME_BYTES,
        packet_limit: int = 0,
        tls: TlsFiles | None = None,
    ) -> None:
        """`packet_limit` (bytes, 0: none) is for brokers that do not tell theirs.

        With `tls` the broker has to be of its CA, and sees its certificate. Raises IdentityError.
        """
        self.address = address
        self._tls = tls.context() if tls is not None else None
        self.protocol = ""
        self.packet_limit: int | None = packet_limit or None
        self.chunked = False
        self._client_id = client_id
        self._subscriptions = [(topic, _QOS) for topic in subscriptions]
        self._will = will
        self._max_payload_bytes = max_payload_bytes
        self._own_limit = packet_limit
        self._joiner = Joiner(max_payload_bytes)
        self._events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._queued_lock = Lock()
        self._answered = Event()
        self._refusal = ""
        self._connected_s = 0.0
        self._short_lives = 0
        self._suspect = (0, 0)  # the largest message under way when the connection was last lost
        self._closing = False
        self._earlier_up = self._earlier_down = 0
        self._client = self._new_client(MQTTProtocolVersion.MQTTv5)

    @property
    def bytes_up(self) -> int:
        """Bytes written to the TCP stream since the link was made, reconnects included."""
        return self._earlier_up + self._client.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes read from the TCP stream since the link was made, reconnects included."""
        return self._earlier_down + self._client.bytes_down

    @property
    def backlog(self) -> int:
        """Messages that the broker has not acknowledged."""
        return self._client.unsent_messages

    def open(self, timeout_s: float) -> None:
        """Connect and subscribe; retries until `timeout_s`. Raises TransportError."""
        if 0 < self._own_limit < MIN_PACKET_BYTES:
            raise TransportError(
                f"packet limit of {self._own_limit} bytes: at least {MIN_PACKET_BYTES} are needed"
            )
        deadline_s = time.monotonic() + timeout_s
        for version in (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311):
            if version != self._client.protocol:
                self._earlier_up, self._earlier_down = self.bytes_up, self.bytes_down
                self._client = self._new_client(version)
            self._first_connect(deadline_s)
            self._client.loop_start()
            left_s = max(1.0, deadline_s - time.monotonic())
            # A 3.1.1 broker may also meet MQTT 5 with silence.
            fallback = version is MQTTProtocolVersion.MQTTv5
            answered = self._answered.wait(min(left_s, _FALLBACK_S) if fallback else left_s)
            if answered and not self._refusal:
                self.protocol = "5" if fallback else "3.1.1"
                return
            self._client.disconnect()
            self._client.loop_stop()
            if self._client.tls_failure is not None:
                raise TransportError(self._explained(self._client.tls_failure))
            if answered and "protocol version" not in self._refusal.lower():
                break
        reason = self._refusal or (
            "it accepts connections but does not speak MQTT, speaks TLS only (--identity), or "
            f"takes packets below {MIN_PACKET_BYTES} bytes only (max_packet_size)"
        )
        raise TransportError(f"broker {self.address} refused the connection: {reason}")

    def publish(self, topic: str, payload: bytes) -> None:
        """Queue a message at QoS 1, in parts if need be; while offline it waits for the reconnect.

        Raises QueueFullError when the queue has no room for all of it, TransportError when no
        queue would have.
        """
        limit = self.packet_limit
        around = len(topic.encode()) + _PUBLISH_BYTES
        packets: list[bytes] | None = [payload]
        if limit is not None and len(payload) + around > limit:
            packets = split(payload, limit - around)
            self.chunked = True
        if packets is None:
            raise TransportError(
                f"broker {self.address} takes packets of {limit} bytes: a message of "
                f"{len(payload)} has too many parts; raise max_packet_size there"
            )
        if self.backlog + len(packets) > _PACKETS_QUEUED:
            raise QueueFullError(
                f"broker {self.address} takes messages too slowly: {self.backlog} are waiting"
            )
        for packet in packets:
            self._client.publish(topic, packet, qos=_QOS)

    def next_event(self, timeout_s: float) -> LinkEvent | None:
        """The next event, or None after `timeout_s`."""
        try:
            event = (
                self._events.get(timeout=timeout_s) if timeout_s > 0 else self._events.get(False)
            )
        except queue.Empty:
            return None
        if isinstance(event, Received):
            with self._queued_lock:
                self._queued_bytes -= len(event.payload)
        return event

    def close(self, flush_s: float = 2.0) -> None:
        """Send what is queued (for at most `flush_s`), disconnect, end the network thread."""
        deadline_s = time.monotonic() + flush_s
        while self._client.is_connected() and time.monotonic() < deadline_s:
            if not self._client.unsent_messages:
                break
            time.sleep(0.01)
        self._closing = True
        if self._client.unsent_messages:
            self._client.drop_connection()  # the goodbye would wait behind what is stuck
        self._client.disconnect()
        self._client.loop_stop()

    def _new_client(self, version: MQTTProtocolVersion) -> CountingClient:
        client = CountingClient(
            self._client_id, version, self._max_payload_bytes, self._on_publish
        )  # fmt: skip
        client.max_inflight_messages_set(_MESSAGES_IN_FLIGHT)
        client.max_queued_messages_set(_PACKETS_QUEUED)
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=_QOS)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.on_socket_open = _prepare_socket
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        self._answered.clear()
        self._refusal = ""
        return client

    def _first_connect(self, deadline_s: float) -> None:
        while True:
            try:
                self._client.connect(*self.address, keepalive=_KEEPALIVE_S)
                return
            except UnicodeError as error:  # labels that are empty or longer than 63 bytes
                raise TransportError(f"broker {self.address}: no name of a host") from error
            except OSError as error:
                if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                    raise TransportError(self._explained(error)) from error
                if time.monotonic() >= deadline_s:
                    tls = ", is that the port of its TLS listener (8883)" if self._tls else ""
                    raise TransportError(
                        f"broker {self.address} cannot be reached ({error.strerror or error}): "
                        f"is it running{tls}, and are host and port right?"
                    ) from error
                time.sleep(0.2)

    def _on_connect(
        self, client: paho.Client, _data: Any, _flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        if code.is_failure:
            self._refusal = str(code)
            self._answered.set()
            return
        self._connected_s = time.monotonic()
        _draw_reconnect_delay(self._client)
        limits = (self._own_limit, getattr(properties, "MaximumPacketSize", None))
        self.packet_limit = min((int(limit) for limit in limits if limit), default=None)
        if self.packet_limit is not None and self.packet_limit < MIN_PACKET_BYTES:
            self._refuse(
                f"it takes packets of {self.packet_limit} bytes, at least {MIN_PACKET_BYTES} are "
                "needed; raise max_packet_size there"
            )
            return
        client.subscribe(self._subscriptions)

    def _refuse(self, reason: str) -> None:
        """Not usable, for good: fails the opening, or ends an open link."""
        self._refusal = reason
        self._answered.set()
        self._put(Disconnected(reason, True))

    def _on_subscribe(
        self, _client: paho.Client, _data: Any, _mid: int, codes: list[ReasonCode], _props: Any
    ) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        if refused:
            self._refuse(f"subscription refused ({refused[0]})")
            return
        self._answered.set()
        self._refusal = ""
        self._put(Connected())

    def _explained(self, error: ssl.SSLError) -> str:
        return explain(error, f"broker {self.address}")

    def _on_connect_fail(self, client: paho.Client, _data: Any) -> None:
        """A reconnect came to nothing; without a reason of TLS's it is the network's."""
        failure = client.tls_failure if isinstance(client, CountingClient) else None
        if failure is not None:
            self._put(Disconnected(self._explained(failure), False))

    def _on_disconnect(
        self, _client: paho.Client, _data: Any, _flags: Any, code: ReasonCode, _props: Any
    ) -> None:
        failure = self._client.tls_failure
        if failure is not None and not self._refusal:  # it does not like our certificate
            if self._answered.is_set():
                self._end(self._explained(failure))
            else:
                self._refuse(self._explained(failure))
            return
        if not self._answered.is_set() or self._refusal:
            return
        short = time.monotonic() - self._connected_s < _SHORT_LIFE_S
        self._short_lives = self._short_lives + 1 if short else 0
        # Brokers before MQTT 5, and some after, do not say why they cut a connection.
        taken_over = code.getName() == "Session taken over"
        largest = self._client.largest_in_flight
        # What was not acknowledged is sent again at once: who cuts for its size cuts again.
        again = short and largest[0] > MIN_PACKET_BYTES and largest == self._suspect
        self._suspect = largest
        if taken_over:
            self._end(f"another client connected with the same id, {self._client_id!r}")
        elif again or code.getName() == "Packet too large":
            self._end(
                f"{self.address} takes no message of {largest[0]} bytes; raise max_packet_size "
                "there, or give a packet limit (device: --packet-limit, server: wire.packet_limit)"
            )
        elif self._short_lives >= _SHORT_LIVES:
            self._end(
                f"another client connected with the same id, {self._client_id!r}, "
                "or the link is unstable"
            )
        else:
            self._put(Disconnected(str(code), False))

    def _end(self, reason: str) -> None:
        self._client.disconnect()  # ends paho's loop: no reconnect
        self._put(Disconnected(reason, True))

    def _on_publish(self, topic: bytes, payload: Payload) -> None:
        try:
            name = topic.decode()
            whole = self._joiner.take(name, payload) if is_part(payload) else payload
        except UnicodeDecodeError:
            return  # no topic of ours
        except HeaderError:
            whole = payload  # as it is: the receiver refuses it, and says so
        if whole is not None:
            self.chunked |= whole is not payload
            self._put(Received(name, whole))

    def _put(self, event: LinkEvent) -> None:
        """Blocks the network thread while the consumer is behind: TCP pushes back."""
        size = len(event.payload) if isinstance(event, Received) else 0
        while not self._closing:
            waiting = self._events.qsize()
            if waiting >= _EVENTS_QUEUED or (
                waiting and self._queued_bytes + size > _BYTES_QUEUED
            ):  # fmt: skip
                time.sleep(0.01)
                continue
            with self._queued_lock:
                self._queued_bytes += size
            self._events.put(event)
            return


def _draw_reconnect_delay(client: CountingClient) -> None:
    client.reconnect_delay_set(
        random.uniform(*_RECONNECT_FIRST_S),  # type: ignore[arg-type]  # noqa: S311 - no secret
        random.uniform(*_RECONNECT_MAX_S),  # type: ignore[arg-type]  # noqa: S311
    )


def _prepare_socket(_client: paho.Client, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux, tcp(7)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * _UNTAKEN_S))
