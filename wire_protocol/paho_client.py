"""paho's client with other hands: large payloads are received without copies, sent without a wait.

What paho 2.2 does, and what is done here instead:

* receiving, it copies a payload five times; here `PacketReader` has it read to where it stays;
* a message published by another thread waits until paho's own thread wakes up; here the
  publishing thread writes to the socket itself, and paho's thread takes what does not fit;
* each partial send copies the rest of the packet; here it is a view;
* the answer to a ping waits behind our own messages on a slow link; here that is no silence;
* each PUBACK is decoded into objects that nobody asks for; here its number is enough;
* under TLS a reason for the end of a connection is lost; here it is kept. OpenSSL wants one thread
  at a connection, so reads and writes take turns.

The names that start with an underscore are paho-private: tests/test_wire_paho.py fails when what
they mean changes.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from threading import Lock, RLock
from typing import Any, Final, TypeAlias

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MessageState, MessageType, MQTTErrorCode
from paho.mqtt.enums import MQTTProtocolVersion as Version
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from wire_protocol.errors import HeaderError
from wire_protocol.mqtt_stream import PacketReader, Payload, Publish

Deliver: TypeAlias = Callable[[bytes, Payload], None]  # topic and payload of a PUBLISH

# What every PUBACK is taken for: building either from a packet costs more than all else.
_DONE: Final = ReasonCode(PacketTypes.PUBACK)
_NOTHING: Final = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]
# Reads a turn: other work of the network thread must not wait for an endless stream.
_READS_A_TURN: Final = 64


class CountingClient(paho.Client):
    """A paho client that counts its stream's bytes and gives PUBLISH packets to `deliver`.

    Payloads above `max_payload_bytes` are acknowledged and dropped.
    """

    def __init__(
        self, client_id: str, version: Version, max_payload_bytes: int, deliver: Deliver
    ) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version)
        self.bytes_up = self.bytes_down = 0
        self._max_payload_bytes = max_payload_bytes
        self._deliver = deliver
        self.tls_failure: ssl.SSLError | None = (
            None  # a failed handshake, or the alert that ended all
        )
        self._write_lock = RLock()
        self._tls_lock = Lock()
        self._reader = self._new_reader()

    @property
    def unsent_messages(self) -> int:
        """Messages that the broker has not acknowledged."""
        return len(self._out_messages)

    @property
    def largest_in_flight(self) -> tuple[int, int]:
        """Payload bytes and packet id of the largest message sent and not acknowledged; or 0, 0."""
        with self._out_message_mutex:
            sent = [
                (len(message.payload), mid)
                for mid, message in self._out_messages.items()
                if message.state == MessageState.MQTT_MS_WAIT_FOR_PUBACK
            ]
        return max(sent, default=(0, 0))

    def drop_connection(self) -> None:
        """Break the TCP stream, whatever is still queued."""
        sock = self.socket()
        if sock is not None:
            with contextlib.suppress(OSError), self._tls_lock:
                sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]  # paho types it by need

    def reconnect(self) -> MQTTErrorCode:
        """As paho's, with a stream that begins anew."""
        self._reader = self._new_reader()
        self.tls_failure = None
        return super().reconnect()

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """As paho's for a context that checks names; keeps the reason of a failure, and closes."""
        context = self._ssl_context
        assert context is not None
        sock = context.wrap_socket(
            tcp_sock, server_hostname=self._host, do_handshake_on_connect=False
        )
        try:
            sock.settimeout(self._connect_timeout)
            sock.do_handshake()
        except OSError as error:
            if isinstance(error, ssl.SSLError):
                self.tls_failure = error
            sock.close()
            raise
        return sock

    def _new_reader(self) -> PacketReader:
        return PacketReader(self._max_payload_bytes, mqtt5=self.protocol == Version.MQTTv5)

    # -- sending -----------------------------------------------------------------------------

    def _packet_queue(
        self, command: int, packet: bytes | bytearray, mid: int, qos: int,
        info: paho.MQTTMessageInfo | None = None,
    ) -> MQTTErrorCode:  # fmt: skip
        """Write at once; wake paho's thread only for what the socket does not take."""
        if command & 0xF0 not in (MessageType.PUBLISH, MessageType.PUBACK):
            return super()._packet_queue(command, packet, mid, qos, info)
        if command & 0xF0 == MessageType.PUBLISH and not self.is_connected():
            # Else it could overtake the CONNECT.
            return MQTTErrorCode.MQTT_ERR_NO_CONN  # paho sends it after the CONNACK
        self._out_packet.append(
            {"command": command, "mid": mid, "qos": qos, "pos": 0, "to_process": len(packet),
             "packet": memoryview(packet), "info": info}  # type: ignore[typeddict-item]
        )  # fmt: skip
        # Whatever goes wrong goes wrong again in paho's thread, which knows what to do.
        if self._packet_write() != MQTTErrorCode.MQTT_ERR_SUCCESS or self._out_packet:
            wake = self._sockpairW
            if wake is not None:
                with contextlib.suppress(OSError):
                    wake.send(b"\0")
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_write(self) -> MQTTErrorCode:
        """Write what is queued, one thread at a time: who finds another at it leaves it to that."""
        result = MQTTErrorCode.MQTT_ERR_SUCCESS
        while self._out_packet and self._write_lock.acquire(blocking=False):
            try:
                result = super()._packet_write()
            finally:
                self._write_lock.release()
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
        return result

    def _check_keepalive(self) -> None:
        """As paho's, but no answer to a ping is missing while a message waits for its PUBACK.

        A megabyte takes longer than the keep-alive on a link of 0.5 Mbit/s, and the ping comes
        after it. Of a peer that is gone the kernel tells, when nothing that is sent is taken.
        """
        if self._out_messages:
            self._ping_t = 0.0
        super()._check_keepalive()

    def _sock_send(self, buf: Any) -> int:
        with self._tls_lock:
            sent: int = super()._sock_send(buf)
        self.bytes_up += sent
        return sent

    # -- receiving ---------------------------------------------------------------------------

    def _packet_read(self) -> MQTTErrorCode:
        """Read what is there, and handle the packets it completes."""
        for _ in range(_READS_A_TURN):
            sock, reader = self._sock, self._reader
            if sock is None:
                break
            target = reader.target
            try:
                with self._tls_lock:
                    count = sock.recv_into(target)  # type: ignore[attr-defined]
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return MQTTErrorCode.MQTT_ERR_AGAIN
            except OSError as error:
                if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or "").upper():
                    self.tls_failure = error
                return MQTTErrorCode.MQTT_ERR_CONN_LOST
            if not count:
                return MQTTErrorCode.MQTT_ERR_CONN_LOST
            self.bytes_down += count
            with self._msgtime_mutex:
                self._last_bytes_received = time.monotonic()
            result = self._handle_packets(reader, count)
            # A TLS record holds 16 KiB at most: less than was asked for says nothing.
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS or (
                count < len(target) and self._ssl_context is None
            ):
                return result
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_packets(self, reader: PacketReader, count: int) -> MQTTErrorCode:
        try:
            for packet in reader.feed(count):
                if isinstance(packet, Publish):
                    if packet.payload is not None:
                        self._deliver(packet.topic, packet.payload)
                    result = self._send_puback(packet.mid) if packet.mid else 0
                elif packet.command == MessageType.PUBACK and len(packet.body) > 1:
                    result = self._acknowledged(int.from_bytes(packet.body[:2], "big"))
                else:
                    self._in_packet["command"] = packet.command
                    self._in_packet["packet"] = bytearray(packet.body)
                    self._in_packet["remaining_length"] = len(packet.body)
                    result = self._packet_handle()
                # A handler may have closed the stream, or begun another.
                if result or self._sock is None or self._reader is not reader:
                    return MQTTErrorCode(result)
        except (HeaderError, MalformedPacket):
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _acknowledged(self, mid: int) -> MQTTErrorCode:
        """What paho does with a PUBACK, but for reading a reason that it then ignores."""
        with self._out_message_mutex:
            if mid not in self._out_messages:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            return self._do_on_publish(mid, _DONE, _NOTHING)
