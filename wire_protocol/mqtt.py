"""The one MQTT file: a bounded, self-reconnecting link to a broker, on paho-mqtt 2.

MQTT 5 first, 3.1.1 when the broker refuses it. QoS 1 always (paho's QoS 2 loses messages over a
broker restart), TCP_NODELAY always (without it a 100-byte exchange takes 44 ms), subscriptions
renewed on every connect (a restarted broker has forgotten them).
"""

from __future__ import annotations

import contextlib
import queue
import socket
import time
from collections.abc import Sequence
from threading import Event, Lock
from typing import Any, Final, NamedTuple, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from wire_protocol.errors import QueueFullError, TransportError
from wire_protocol.frames import MAX_FRAME_BYTES

DEFAULT_PORT: Final = 1883
_KEEPALIVE_S: Final = 15
_QOS: Final = 1
_EVENTS_QUEUED: Final = 512
_BYTES_QUEUED: Final = 256 << 20
_MESSAGES_QUEUED: Final = 4096
_MESSAGES_IN_FLIGHT: Final = 64
_RECONNECT_MAX_S: Final = 8
_FALLBACK_S: Final = 2.0
# Connections in a row that lasted less than this are what two clients with one id do to each other.
_SHORT_LIFE_S: Final = 3.0
_SHORT_LIVES: Final = 5


class Address(NamedTuple):
    """Where a broker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Connected(NamedTuple):
    """The link is up and subscribed (again)."""


class Disconnected(NamedTuple):
    """The link is down; it reconnects by itself unless `fatal` says why it cannot."""

    reason: str
    fatal: bool


class Received(NamedTuple):
    """A message on one of the subscribed topics."""

    topic: str
    payload: bytes


LinkEvent = Connected | Disconnected | Received


class Will(NamedTuple):
    """What the broker publishes for us when the connection is lost."""

    topic: str
    payload: bytes


class LinkLike(Protocol):
    """What agents and drivers need of a link; tests and the in-process fleet bring their own."""

    @property
    def bytes_up(self) -> int:
        """Bytes written to the stream so far."""
        ...

    @property
    def bytes_down(self) -> int:
        """Bytes read from the stream so far."""
        ...

    @property
    def backlog(self) -> int:
        """Messages that the broker has not acknowledged."""
        ...

    def publish(self, topic: str, payload: bytes) -> None:
        """Queue a message."""
        ...

    def next_event(self, timeout_s: float) -> LinkEvent | None:
        """The next event, or None after `timeout_s`."""
        ...


class _CountingClient(paho.Client):
    """paho's client, counting its stream's bytes; the names it overrides are paho-private."""

    bytes_up = 0
    bytes_down = 0

    @property
    def unsent_messages(self) -> int:
        """Messages that the broker has not acknowledged."""
        return len(self._out_messages)

    def drop_connection(self) -> None:
        """Break the TCP stream, whatever is still queued."""
        sock = self.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]  # paho types it by need

    def _sock_send(self, buf: bytes | bytearray) -> int:
        sent: int = super()._sock_send(buf)
        self.bytes_up += sent
        return sent

    def _sock_recv(self, bufsize: int) -> bytes:
        data: bytes = super()._sock_recv(bufsize)
        self.bytes_down += len(data)
        return data


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
    ) -> None:
        self.address = address
        self.protocol = ""
        self.max_packet_bytes: int | None = None
        self._client_id = client_id
        self._subscriptions = [(topic, _QOS) for topic in subscriptions]
        self._will = will
        self._max_payload_bytes = max_payload_bytes
        self._events: queue.Queue[LinkEvent] = queue.Queue(_EVENTS_QUEUED)
        self._queued_bytes = 0
        self._queued_lock = Lock()
        self._answered = Event()
        self._refusal = ""
        self._connected_s = 0.0
        self._short_lives = 0
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
            if answered and "protocol version" not in self._refusal.lower():
                break
        reason = self._refusal or "it accepts connections but does not speak MQTT"
        raise TransportError(f"broker {self.address} refused the connection: {reason}")

    def publish(self, topic: str, payload: bytes) -> None:
        """Queue a message at QoS 1; while offline it waits for the reconnect.

        Raises TransportError above the broker's packet limit, QueueFullError above the queue's.
        """
        limit = self.max_packet_bytes
        if limit is not None and len(payload) + len(topic) + 16 > limit:
            raise TransportError(
                f"broker {self.address} takes packets of {limit} bytes, this message has "
                f"{len(payload)}: raise max_packet_size there, or use a smaller batch"
            )
        info = self._client.publish(topic, payload, qos=_QOS)
        if info.rc == paho.MQTT_ERR_QUEUE_SIZE:
            raise QueueFullError(
                f"broker {self.address} takes messages too slowly: {_MESSAGES_QUEUED} are waiting"
            )

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

    def _new_client(self, version: MQTTProtocolVersion) -> _CountingClient:
        client = _CountingClient(
            CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=version
        )
        client.max_inflight_messages_set(_MESSAGES_IN_FLIGHT)
        client.max_queued_messages_set(_MESSAGES_QUEUED)
        client.reconnect_delay_set(min_delay=1, max_delay=_RECONNECT_MAX_S)
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=_QOS)
        client.on_socket_open = _set_nodelay
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        self._answered.clear()
        self._refusal = ""
        return client

    def _first_connect(self, deadline_s: float) -> None:
        while True:
            try:
                self._client.connect(*self.address, keepalive=_KEEPALIVE_S)
                return
            except OSError as error:
                if time.monotonic() >= deadline_s:
                    raise TransportError(
                        f"broker {self.address} cannot be reached ({error.strerror or error}): "
                        "is it running, and are host and port right?"
                    ) from error
                time.sleep(0.2)

    def _on_connect(
        self, client: paho.Client, _data: Any, _flags: Any, code: ReasonCode, properties: Any
    ) -> None:
        if code.is_failure:
            self._refusal = str(code)
            self._answered.set()
            return
        limit = getattr(properties, "MaximumPacketSize", None)
        self.max_packet_bytes = int(limit) if limit else None
        client.subscribe(self._subscriptions)

    def _on_subscribe(
        self, _client: paho.Client, _data: Any, _mid: int, codes: list[ReasonCode], _props: Any
    ) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        if refused:
            self._refusal = f"subscription refused ({refused[0]})"
        self._answered.set()
        if refused:
            self._put(Disconnected(self._refusal, True))
            return
        self._refusal = ""
        self._connected_s = time.monotonic()
        self._put(Connected())

    def _on_disconnect(
        self, _client: paho.Client, _data: Any, _flags: Any, code: ReasonCode, _props: Any
    ) -> None:
        if not self._answered.is_set() or self._refusal:
            return
        short = time.monotonic() - self._connected_s < _SHORT_LIFE_S
        self._short_lives = self._short_lives + 1 if short else 0
        # Brokers before MQTT 5, and some after, do not say why they cut a connection.
        taken_over = code.getName() == "Session taken over"
        if taken_over or self._short_lives >= _SHORT_LIVES:
            self._client.disconnect()  # ends paho's loop: no reconnect
            reason = "another client connected with the same id"
            self._put(
                Disconnected(reason + ("" if taken_over else ", or the link is unstable"), True)
            )
        else:
            self._put(Disconnected(str(code), False))

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if len(message.payload) > self._max_payload_bytes:
            return
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return  # no topic of ours: an error here would end paho's thread
        self._put(Received(topic, bytes(message.payload)))

    def _put(self, event: LinkEvent) -> None:
        """Blocks the network thread while the consumer is behind: TCP pushes back."""
        size = len(event.payload) if isinstance(event, Received) else 0
        while not self._closing:
            if self._queued_bytes + size > _BYTES_QUEUED and not self._events.empty():
                time.sleep(0.01)
                continue
            try:
                self._events.put(event, timeout=0.2)
            except queue.Full:
                continue
            with self._queued_lock:
                self._queued_bytes += size
            return


def _set_nodelay(_client: paho.Client, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
