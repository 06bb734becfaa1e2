"""On the device: make a key, ask for a certificate with a one-time token, keep the identity.

What is done already is not done again, whatever stopped it: the key is on disk before it is used,
and the service answers the same key with the same certificate.
"""

from __future__ import annotations

import contextlib
import ssl
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from identity.certificates import (
    BACKDATED,
    common_name,
    issued_by,
    key_digest,
    key_pem,
    new_key,
    read_certificate,
    read_key,
    request,
    utc,
)
from identity.errors import EnrolmentError
from identity.exchange import DEFAULT_PORT, MAX_BYTES, PATH, Answer, Refusal, Request
from identity.files import (
    SIGNER_FILE,
    locked,
    make_folder,
    read,
    write_private,
    write_public,
)
from wire_protocol.errors import IdentityError, InputError, TransportError
from wire_protocol.events import Address
from wire_protocol.messages import printable
from wire_protocol.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, explain, trusting
from wire_protocol.topics import check_name

_TIMEOUT_S: Final = 15.0
# A certificate with less left is renewed when there is a token.
RENEW: Final = timedelta(days=30)
_REMEDY: Final = "enrol this machine: musplit enroll"


class Enrolled(NamedTuple):
    """The identity that is there now."""

    device_id: str
    expires_unix_s: int
    fresh: bool  # False: it was there already


def enrol(
    url: str, ca: Path, token: str, folder: Path, device_id: str, now_s: float
) -> Enrolled:  # fmt: skip
    """Get an identity for `folder`, unless a valid one is there.

    `token` and `device_id` may be empty: without a token only what is there is checked, and the
    token says which device it is for. Raises IdentityError, EnrolmentError, TransportError.
    """
    there = _valid(folder, device_id, now_s)
    if there is not None and _lasts(there, token, now_s):
        return there
    if not token:
        raise IdentityError(f"{folder}: holds no valid certificate, and no token is given")
    name = check_name(token.partition(":")[0], "the token's device id")
    if device_id not in ("", name):
        raise IdentityError(f"the token is for device {name!r}, not for {device_id!r}")
    authority = read_certificate(ca, "copy the lab's ca.pem there")
    _check_clock(authority, now_s)
    make_folder(folder)
    with locked(folder):
        there = _valid(folder, device_id, now_s)  # another program may have been faster
        if there is not None and _lasts(there, token, now_s):
            return there
        return _redeem(url, ca, token, folder, authority)


def _lasts(there: Enrolled, token: str, now_s: float) -> bool:
    return not token or there.expires_unix_s - now_s > RENEW.total_seconds()


def _redeem(url: str, ca: Path, token: str, folder: Path, authority: x509.Certificate) -> Enrolled:
    """Change the token for a certificate of the key in `folder`."""
    name = token.partition(":")[0]
    pinned = folder / SIGNER_FILE
    signer = read(pinned, _REMEDY) if pinned.exists() else b""
    key = _own_key(folder)
    answer = _ask(url, ca, Request(token, request(name, key).decode()))
    certificate = _checked(answer, authority, key, name)
    # The service shows the broker's certificate; what the lab gave by hand is worth more.
    if signer and signer.split() != answer.signer.encode().split():
        raise EnrolmentError(
            f"the service's signer.pub is another than {pinned}: is it the lab's service? If the "
            "lab has a new one, remove that file and enrol again"
        )
    write_public(folder / CA_FILE, read(ca, _REMEDY))
    write_public(pinned, answer.signer.encode())
    # Last: with it the identity is there.
    write_public(folder / CERTIFICATE_FILE, answer.certificate.encode())
    return Enrolled(name, int(certificate.not_valid_after_utc.timestamp()), True)


def _valid(folder: Path, device_id: str, now_s: float) -> Enrolled | None:
    """What is in the folder when it is whole and fits; None when there is anything to do."""
    try:
        certificate = read_certificate(folder / CERTIFICATE_FILE, _REMEDY)
        authority = read_certificate(folder / CA_FILE, _REMEDY)
        key = read_key(folder / KEY_FILE, _REMEDY)
        read(folder / SIGNER_FILE, _REMEDY)
    except IdentityError:
        return None
    name = common_name(certificate.subject)
    if device_id not in ("", name):
        raise IdentityError(
            f"{folder}: is the identity of {name!r}, not of {device_id!r}; give another --identity"
        )
    _check_clock(authority, now_s)
    if not _fits(certificate, authority, key) or utc(now_s) >= certificate.not_valid_after_utc:
        return None
    return Enrolled(name, int(certificate.not_valid_after_utc.timestamp()), False)


def _check_clock(authority: x509.Certificate, now_s: float) -> None:
    made = authority.not_valid_before_utc
    if utc(now_s) < made:
        raise TransportError(
            f"this machine's clock says {utc(now_s):%Y-%m-%d %H:%M} UTC, before the lab's CA was "
            f"made ({made + BACKDATED:%Y-%m-%d}): set it (a board without a clock battery starts "
            "in the past: wait for NTP, or timedatectl set-time)"
        )


def _own_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The key that an attempt before this one made, or a new one."""
    path = folder / KEY_FILE
    if path.exists():
        return read_key(path, f"remove {path}, and enrol again")
    key = new_key()
    write_private(path, key_pem(key))
    return key


def _ask(url: str, ca: Path, body: Request) -> Answer:
    address, path = _parse(url)
    connection = HTTPSConnection(
        address.host, address.port, timeout=_TIMEOUT_S, context=trusting(ca)
    )
    peer = f"enrolment service {address}"
    with contextlib.closing(connection):
        try:
            connection.request(
                "POST", path, msgspec.json.encode(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            data = response.read(MAX_BYTES)
        except ssl.SSLError as error:
            raise TransportError(explain(error, peer)) from error
        except (OSError, HTTPException, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TransportError(
                f"{peer} cannot be reached ({reason}): does `musplit ca serve` run there?"
            ) from error
    if response.status == HTTPStatus.OK:
        return _decoded(data, peer)
    try:
        reason = printable(msgspec.json.decode(data, type=Refusal).error)
    except ValueError:
        reason = f"HTTP status {response.status}"
    if response.status == HTTPStatus.FORBIDDEN:
        raise EnrolmentError(f"{peer} refused: {reason}")
    raise TransportError(f"{peer}: {reason}; try again later")


def _decoded(data: bytes, peer: str) -> Answer:
    try:
        return msgspec.json.decode(data, type=Answer)
    except ValueError as error:
        raise EnrolmentError(f"{peer} gave no answer of this version: {error}") from error


def _parse(url: str) -> tuple[Address, str]:
    """Where to ask. Raises InputError."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        raise InputError(f"--url {url!r}: {error}") from error
    if parts.scheme != "https" or not parts.hostname or parts.username or parts.query:
        raise InputError(
            f"--url {url!r}: write https://HOST[:PORT], e.g. https://192.168.1.10:8884"
        )
    return Address(parts.hostname, port), parts.path.rstrip("/") or PATH


def _checked(
    answer: Answer, authority: x509.Certificate, key: ec.EllipticCurvePrivateKey, name: str
) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    except ValueError as error:
        raise EnrolmentError("the service's answer holds no certificate") from error
    if not _fits(certificate, authority, key) or common_name(certificate.subject) != name:
        raise EnrolmentError("the service's certificate is for another key, name or CA")
    return certificate


def _fits(
    certificate: x509.Certificate, authority: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> bool:
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    same = key_digest(public) == key_digest(key.public_key())
    return same and issued_by(certificate, authority)
