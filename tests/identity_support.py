"""A lab for tests: an authority, identities, and a real mosquitto with its access list."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Final, Self

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from identity.access import ACL_FILE
from identity.authority import Authority
from identity.broker import refresh_broker_folder, write_broker_folder
from identity.certificates import (
    Issuer,
    Purpose,
    issue,
    key_pem,
    new_key,
    pem,
    read_certificate,
    read_key,
    request,
    utc,
)
from identity.files import make_folder, write_private, write_public
from wire_protocol.tls import TlsFiles

LOOPBACK: Final = "127.0.0.1"
TESTER: Final = "_tester"  # may do everything; in no list of the project's

needs_mosquitto = pytest.mark.skipif(
    not shutil.which("mosquitto"), reason="mosquitto is not installed"
)


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


class Lab:
    """An authority with fleets `lab` and `other`, made at `now_s`."""

    def __init__(self, folder: Path, now_s: float | None = None) -> None:
        self.folder = folder
        self.now_s = time.time() if now_s is None else now_s
        self.authority = Authority.init(folder / "ca", ["lab", "other"], [], self.now_s)

    @property
    def ca(self) -> Path:
        return self.folder / "ca" / "ca.pem"

    def server(self, fleet: str) -> TlsFiles:
        return TlsFiles.in_folder(self.folder / "ca" / "servers" / fleet)

    def enrol(self, name: str) -> TlsFiles:
        """A device's identity, by a token of its own."""
        key = new_key()
        token = self.authority.new_token(name, 60, self.now_s)
        done = self.authority.redeem(token, request(name, key), self.now_s)
        folder = self.folder / "boards" / name
        return self._keep(folder, done.certificate, key_pem(key))

    def forge(
        self, name: str, *, purpose: Purpose = Purpose.CLIENT, days: float = 1.0,
        age_days: float = 0.0,
    ) -> TlsFiles:  # fmt: skip
        """A certificate of the lab's CA that its rules would not give."""
        folder = self.folder / "ca"
        issuer = Issuer(read_certificate(self.ca, ""), read_key(folder / "ca.key", ""))
        key, now = new_key(), utc(self.now_s - age_days * 86400)
        certificate = issue(issuer, name, key.public_key(), purpose, now, timedelta(days=days))
        return self._keep(self.folder / "forged" / name, pem(certificate), key_pem(key))

    def _keep(self, folder: Path, certificate: bytes, key: bytes) -> TlsFiles:
        make_folder(folder)
        files = TlsFiles.in_folder(folder)
        write_public(files.ca, self.ca.read_bytes())
        write_public(files.certificate, certificate)
        write_private(files.key, key)
        write_public(folder / "signer.pub", (self.folder / "ca" / "signer.pub").read_bytes())
        return files


class Mosquitto:
    """The lab's own mosquitto, as `musplit ca broker-config` sets it up, and a tester beside it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.port = lab, free_port()
        self.folder = lab.folder / f"broker-{self.port}"
        write_broker_folder(lab.authority, self.folder, LOOPBACK, self.port, lab.now_s)
        self.tester = lab.forge(TESTER)
        self._admit_tester()

    def _admit_tester(self) -> None:
        with (self.folder / ACL_FILE).open("a") as file:
            file.write(f"\nuser {TESTER}\ntopic readwrite #\ntopic readwrite $SYS/#\n")

    def __enter__(self) -> Self:
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            ["mosquitto", "-c", str(self.folder / "mosquitto.conf")],
            stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            try:
                socket.create_connection((LOOPBACK, self.port), 1).close()
                return self
            except OSError:
                assert self.process.poll() is None, self.log
                time.sleep(0.02)
        raise AssertionError(self.log)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(10)
        self._log.close()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def reload(self) -> None:
        """New lists, read on SIGHUP."""
        refresh_broker_folder(self.lab.authority, self.folder, self.lab.now_s + 1)
        self._admit_tester()
        self.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)


class Client:
    """A plain MQTT 5 client with an identity: what comes, and what became of a publish."""

    def __init__(
        self, port: int, files: TlsFiles | None, *, client_id: str = "", ca: Path | None = None,
        will: str = "",
    ) -> None:  # fmt: skip
        self.received: list[tuple[str, bytes]] = []
        self.reason = ""
        self._done = threading.Event()
        self._puback: dict[int, str] = {}
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5
        )
        context = ssl.create_default_context(cafile=str(ca or (files and files.ca)))
        if files is not None:
            context.load_cert_chain(files.certificate, files.key)
        self._client.tls_set_context(context)
        if will:
            self._client.will_set(will, b"will", 1)
        self._client.on_connect = lambda *a: self._answer(str(a[3]))
        self._client.on_subscribe = lambda *_: self._done.set()
        self._client.on_disconnect = lambda *a: self._answer(f"disconnected: {a[3]}")
        self._client.on_message = lambda _c, _d, m: self.received.append((m.topic, m.payload))
        self._client.on_publish = lambda _c, _d, mid, code, _p: self._puback.update(
            {mid: str(code)}
        )
        self._client.connect(LOOPBACK, port)
        self._client.loop_start()
        assert self._done.wait(5)

    @property
    def connected(self) -> bool:
        return self._client.is_connected()

    def subscribe(self, *topics: str) -> None:
        for topic in topics:
            self._done.clear()
            self._client.subscribe(topic, 1)
            assert self._done.wait(5)

    def publish(self, topic: str, payload: bytes) -> str:
        """What the broker's acknowledgement says."""
        mid = self._client.publish(topic, payload, 1).mid
        deadline_s = time.monotonic() + 5
        while mid not in self._puback:
            assert time.monotonic() < deadline_s, f"{topic}: no acknowledgement"
            time.sleep(0.002)
        return self._puback[mid]

    def drop(self) -> None:
        """End without a goodbye."""
        self._client.loop_stop()
        self._client.socket().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _answer(self, reason: str) -> None:
        self.reason = reason
        self._done.set()
