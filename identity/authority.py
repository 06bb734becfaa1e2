"""The lab's certificate authority: a folder that stays with whoever runs the lab.

ca.pem, ca.key            the authority; the key signs certificates and the revocation list
signer.pub, signer.key    signs bundles
servers/FLEET/            the identity of a fleet's server: copy it where `musplit serve` runs
broker.pem, broker.key    the certificate that broker and enrolment service show
ledger.json, audit.jsonl  see ledger.py
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace

from identity.access import server_name
from identity.certificates import (
    Issuer,
    Purpose,
    authority,
    check_host,
    issue,
    key_digest,
    key_pem,
    new_key,
    pem,
    read_certificate,
    read_key,
    read_request,
    revocation_list,
    utc,
)
from identity.errors import AuthorityError, EnrolmentError
from identity.files import (
    BROKER_FILE,
    BROKER_KEY_FILE,
    SIGNER_FILE,
    SIGNER_KEY_FILE,
    make_folder,
    read,
    write_private,
    write_public,
)
from identity.ledger import Issued, Ledger, LedgerFile, Role, Token
from identity.signatures import new_signer
from wire_protocol.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE
from wire_protocol.topics import check_name

CA_KEY_FILE: Final = "ca.key"
SERVERS_FOLDER: Final = "servers"
BROKER_NAME: Final = "_broker"
CA_DAYS: Final = 3650
_OWN_DAYS: Final = 730  # of the broker's and the servers' certificates
DEVICE_DAYS: Final = 365
_REMEDY: Final = "restore the authority's folder from a copy, or make one: musplit ca init"
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_TOKEN_BYTES: Final = 32


class Enrolment(NamedTuple):
    """What a device gets for its token: three PEM files."""

    certificate: bytes
    ca: bytes
    signer: bytes


class Authority:
    """An authority's folder. Times are Unix time in seconds; nothing here reads a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = LedgerFile(folder)

    @classmethod
    def init(
        cls, folder: Path, fleets: list[str], hosts: list[str], now_s: float
    ) -> Authority:  # fmt: skip
        """Make the authority, its signer, the broker's certificate, the servers' identities.

        Raises AuthorityError when there is one already.
        """
        for fleet in fleets:
            server_name(fleet)
        for host in hosts:
            check_host(host)
        ours = cls(folder)
        make_folder(folder)
        with ours._file.locked():
            if ours._file.exists:
                raise AuthorityError(f"{folder}: holds an authority already; give another --dir")
            issuer = authority("musplit lab", utc(now_s), timedelta(days=CA_DAYS))
            write_private(folder / CA_KEY_FILE, key_pem(issuer.key))
            write_public(folder / CA_FILE, pem(issuer.certificate))
            private, public = new_signer()
            write_private(folder / SIGNER_KEY_FILE, private)
            write_public(folder / SIGNER_FILE, public)
            ledger = ours._certify_broker(Ledger([], [], [], []), hosts, now_s)
            for fleet in fleets:
                ledger = ours._certify_server(ledger, fleet, now_s)
            ours._file.write(ledger)
            ours._file.audit(now_s, "init", "")
        return ours

    def ledger(self) -> Ledger:
        """Everything issued so far. Raises AuthorityError."""
        return self._file.read()

    def audit(self, now_s: float, event: str, device_id: str, **facts: str) -> None:
        """Add a line to the audit log."""
        self._file.audit(now_s, event, device_id, **facts)

    def add_fleet(self, fleet: str, now_s: float) -> Path:
        """The folder with the identity of a fleet's server, made or renewed."""
        server_name(fleet)
        with self._file.locked():
            self._file.write(self._certify_server(self._file.read(), fleet, now_s))
            self._file.audit(now_s, "fleet", server_name(fleet))
        return self.folder / SERVERS_FOLDER / fleet

    def set_hosts(self, hosts: list[str], now_s: float) -> None:
        """A new certificate of the broker, for these names and addresses. Raises AuthorityError."""
        for host in hosts:
            check_host(host)
        with self._file.locked():
            self._file.write(self._certify_broker(self._file.read(), hosts, now_s))
            self._file.audit(now_s, "hosts", BROKER_NAME, hosts=",".join(hosts))

    def new_token(self, device_id: str, valid_s: float, now_s: float) -> str:
        """A token that enrols `device_id` once; an earlier one of it becomes void."""
        check_name(device_id, "device id")
        token = f"{device_id}:{secrets.token_urlsafe(_TOKEN_BYTES)}"
        with self._file.locked():
            ledger = _void_tokens(self._file.read(), device_id)
            entry = Token(_digest(token), device_id, int(now_s + valid_s))
            self._file.write(replace(ledger, tokens=[*ledger.tokens, entry]))
            self._file.audit(now_s, "token", device_id, expires=utc(now_s + valid_s).isoformat())
        return token

    def redeem(self, token: str, request: bytes, now_s: float) -> Enrolment:
        """Use a token: the certificate for the key of a signing request.

        The same key gets the same certificate again, in case the answer was lost. Raises
        EnrolmentError with the reason.
        """
        with self._file.locked():
            ledger = self._file.read()
            found = _find(ledger, token)
            name, key = read_request(request)
            digest = key_digest(key)
            if found.used_unix_s is not None and found.key_sha256 == digest and not found.void:
                return self._again(found, ledger, now_s)
            _check_token(found, name, now_s)
            ledger = _revoke(ledger, found.device_id, now_s)  # one certificate per device
            certificate, ledger = self._issue(
                ledger, name, "device", key, Purpose.CLIENT, DEVICE_DAYS, now_s
            )
            make_folder(self.folder / "devices")
            write_public(self._device_file(name), certificate)
            used = replace(found, used_unix_s=int(now_s), key_sha256=digest)
            tokens = [used if t.sha256 == found.sha256 else t for t in ledger.tokens]
            self._file.write(replace(ledger, tokens=tokens))
        return self._enrolment(certificate)

    def revoke(self, name: str, now_s: float) -> int:
        """Revoke every certificate and token of a device or server; returns how many certificates.

        Raises AuthorityError for a name that has none.
        """
        with self._file.locked():
            ledger = self._file.read()
            live = sum(1 for i in ledger.certificates if i.name == name and i.live(now_s))
            open_tokens = any(
                t.device_id == name and not t.void and t.used_unix_s is None for t in ledger.tokens
            )
            if not live and not open_tokens:
                raise AuthorityError(
                    f"{name}: has no valid certificate and no open token; see musplit ca list"
                )
            self._file.write(_void_tokens(_revoke(ledger, name, now_s), name))
            self._file.audit(now_s, "revoked", name)
        return live

    def revocation_list(self, now_s: float) -> bytes:
        """The list for brokers, PEM, empty or not."""
        revoked = [
            (int(i.serial, 16), utc(i.revoked_unix_s))
            for i in self._file.read().certificates
            if i.revoked_unix_s is not None
        ]
        return revocation_list(self._issuer(), revoked, utc(now_s))

    # -- inside ------------------------------------------------------------------------------

    def _issuer(self) -> Issuer:
        return Issuer(
            read_certificate(self.folder / CA_FILE, _REMEDY),
            read_key(self.folder / CA_KEY_FILE, _REMEDY),
        )

    def _issue(
        self, ledger: Ledger, name: str, role: Role, key: ec.EllipticCurvePublicKey,
        purpose: Purpose, days: int, now_s: float, hosts: tuple[str, ...] = (),
    ) -> tuple[bytes, Ledger]:  # fmt: skip
        certificate = issue(
            self._issuer(), name, key, purpose, utc(now_s), timedelta(days=days), hosts
        )
        entry = Issued(
            name, role, f"{certificate.serial_number:x}", int(now_s),
            int(certificate.not_valid_after_utc.timestamp()), key_digest(key),
        )  # fmt: skip
        return pem(certificate), replace(ledger, certificates=[*ledger.certificates, entry])

    def _certify_broker(self, ledger: Ledger, hosts: list[str], now_s: float) -> Ledger:
        key = new_key()
        names = tuple(dict.fromkeys((*_LOOPBACK, *hosts)))
        certificate, ledger = self._issue(
            _revoke(ledger, BROKER_NAME, now_s), BROKER_NAME, "broker", key.public_key(),
            Purpose.HOST, _OWN_DAYS, now_s, names,
        )  # fmt: skip
        write_private(self.folder / BROKER_KEY_FILE, key_pem(key))
        write_public(self.folder / BROKER_FILE, certificate)
        return replace(ledger, hosts=hosts)

    def _certify_server(self, ledger: Ledger, fleet: str, now_s: float) -> Ledger:
        key, name = new_key(), server_name(fleet)
        certificate, ledger = self._issue(
            _revoke(ledger, name, now_s), name, "server", key.public_key(), Purpose.CLIENT,
            _OWN_DAYS, now_s,
        )  # fmt: skip
        folder = self.folder / SERVERS_FOLDER / fleet
        make_folder(folder)
        write_private(folder / KEY_FILE, key_pem(key))
        write_public(folder / CERTIFICATE_FILE, certificate)
        write_private(folder / SIGNER_KEY_FILE, read(self.folder / SIGNER_KEY_FILE, _REMEDY))
        for name in (CA_FILE, SIGNER_FILE):
            write_public(folder / name, read(self.folder / name, _REMEDY))
        return replace(ledger, fleets=sorted({*ledger.fleets, fleet}))

    def _device_file(self, name: str) -> Path:
        return self.folder / "devices" / f"{name}.pem"

    def _again(self, token: Token, ledger: Ledger, now_s: float) -> Enrolment:
        if not any(i.key_sha256 == token.key_sha256 and i.live(now_s) for i in ledger.certificates):
            raise EnrolmentError("this token was used, and its certificate is revoked or expired")
        return self._enrolment(read(self._device_file(token.device_id), _REMEDY))

    def _enrolment(self, certificate: bytes) -> Enrolment:
        ca, signer = (read(self.folder / name, _REMEDY) for name in (CA_FILE, SIGNER_FILE))
        return Enrolment(certificate, ca, signer)


def _digest(token: str) -> str:
    # 256 random bits need no slow hash.
    return hashlib.sha256(token.encode()).hexdigest()


def _find(ledger: Ledger, token: str) -> Token:
    digest, found = _digest(token), None
    for entry in ledger.tokens:  # all of them, in a time that tells nothing
        if hmac.compare_digest(entry.sha256, digest):
            found = entry
    if found is None:
        raise EnrolmentError("unknown token: is it whole, and of this lab?")
    return found


def _check_token(token: Token, name: str, now_s: float) -> None:
    if token.void:
        raise EnrolmentError("this token is void: the device was revoked, or has a newer token")
    if token.used_unix_s is not None:
        raise EnrolmentError(
            f"this token was used already at {utc(token.used_unix_s):%Y-%m-%d %H:%M} UTC; if that "
            f"was not you, revoke the device: musplit ca revoke {token.device_id}"
        )
    if now_s >= token.expires_unix_s:
        raise EnrolmentError(
            f"this token expired at {utc(token.expires_unix_s):%Y-%m-%d %H:%M} UTC; make another: "
            f"musplit ca enroll {token.device_id}"
        )
    if name != token.device_id:
        raise EnrolmentError(f"this token is for {token.device_id!r}, not for {name!r}")


def _revoke(ledger: Ledger, name: str, now_s: float) -> Ledger:
    certificates = [
        replace(i, revoked_unix_s=int(now_s)) if i.name == name and i.live(now_s) else i
        for i in ledger.certificates
    ]
    return replace(ledger, certificates=certificates)


def _void_tokens(ledger: Ledger, device_id: str) -> Ledger:
    tokens = [replace(t, void=True) if t.device_id == device_id else t for t in ledger.tokens]
    return replace(ledger, tokens=tokens)
