"""What a board is to become: checked once, then only read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final, NamedTuple

from firmware_profiles.errors import FlashError
from wire_protocol.topics import check_name

_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_COUNTRY: Final = re.compile(r"[A-Z]{2}")
# Host names, IPv4 and IPv6 addresses: nothing that a shell or systemd would read as more.
_BROKER: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9.-]*(?::(\d{1,5}))?|\[[0-9a-fA-F:]+\](?::(\d{1,5}))?"
)
_URL: Final = re.compile(
    r"https://(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(?::(\d{1,5}))?(?:/[A-Za-z0-9./_-]*)?"
)
_SSH_KEY: Final = re.compile(
    r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\n]*)?"
)
_SSID_BYTES: Final = 32


class Wifi(NamedTuple):
    """A WPA2 network. The passphrase is forgotten at once; `psk` is what a board needs of it."""

    ssid: str
    psk: str  # PBKDF2 of passphrase and SSID, 64 hexadecimal digits
    country: str

    @classmethod
    def of(cls, ssid: str, passphrase: str, country: str) -> Wifi:
        """Raises FlashError, which does not repeat the passphrase."""
        octets = ssid.encode(errors="replace")  # what is no text is not printable either
        if not 1 <= len(octets) <= _SSID_BYTES or not ssid.isprintable():
            raise FlashError("--wifi-ssid: write 1 to 32 printable bytes")
        if not 8 <= len(passphrase) <= 63 or not passphrase.isprintable():
            raise FlashError("--wifi-passphrase-file: a passphrase has 8 to 63 characters")
        if not _COUNTRY.fullmatch(country):
            raise FlashError("--wifi-country: write two capital letters, e.g. DE: radios need it")
        psk = hashlib.pbkdf2_hmac("sha1", passphrase.encode(), octets, 4096, 32)
        return cls(ssid, psk.hex(), country)


class Login(NamedTuple):
    """The account for people, by key alone: its password is locked."""

    user: str
    key: str

    @classmethod
    def of(cls, user: str, key: str) -> Login:
        """`key`: a line of a .pub file. Raises FlashError."""
        if not _USER.fullmatch(user):
            raise FlashError(f"--user {user!r}: use small letters, digits, '-' and '_'")
        key = key.strip()
        if not _SSH_KEY.fullmatch(key) or not key.isprintable():
            raise FlashError("--ssh-key: not the line of an OpenSSH public key (a .pub file)")
        return cls(user, key)


class Lab(NamedTuple):
    """How a device proves itself, and whom it trusts. All None and empty: a plain link."""

    ca: Path | None = None
    signer: Path | None = None
    token: str = ""
    enrol_url: str = ""

    @property
    def secure(self) -> bool:
        """TLS with a certificate."""
        return self.ca is not None


class Order(NamedTuple):
    """One device. `broker` is HOST[:PORT]; `threads` are ONNX Runtime's."""

    device_id: str
    broker: str
    fleet: str
    threads: int
    lab: Lab
    wifi: Wifi | None = None
    login: Login | None = None
    shard: Path | None = None

    def check(self) -> None:
        """Raises InputError."""
        check_name(self.device_id, "device id")
        check_name(self.fleet, "fleet")
        broker = _BROKER.fullmatch(self.broker)
        if not broker or not _is_port(broker[1] or broker[2]):
            raise FlashError(
                f"--broker {self.broker!r}: write HOST or HOST:PORT, e.g. 192.168.1.10"
            )
        name = self.lab.token.partition(":")[0]  # a token begins with the device it is for
        if self.lab.secure and name != self.device_id:
            raise FlashError(
                f"--token-file: not a token for {self.device_id!r}; make one: musplit ca enroll"
            )
        url = _URL.fullmatch(self.lab.enrol_url)
        if self.lab.secure and (not url or not _is_port(url[1])):
            raise FlashError(f"--enrol-url {self.lab.enrol_url!r}: write https://HOST:PORT")

    @property
    def hostname(self) -> str:
        """The device id as a host name."""
        return (
            re.sub(r"[^a-z0-9-]+", "-", self.device_id.lower()).strip("-")[:63].rstrip("-")
            or "musplit"
        )


def _is_port(digits: str | None) -> bool:
    return digits is None or 0 < int(digits) < 65536
