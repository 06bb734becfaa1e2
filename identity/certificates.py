"""X.509 as the lab uses it: P-256 keys, one purpose per certificate, names in the common name."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from identity.errors import AuthorityError, EnrolmentError
from identity.files import read
from wire_protocol.errors import IdentityError
from wire_protocol.tls import check_private

# Boards' clocks are behind: a certificate is valid from a day before it was made.
BACKDATED: Final = timedelta(days=1)
_NAME_MAX: Final = 64  # RFC 5280, ub-common-name
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_NOTHING: Final = dict.fromkeys(
    ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
     "encipher_only", "decipher_only", "key_cert_sign", "crl_sign", "digital_signature"), False,
)  # fmt: skip


class Purpose(Enum):
    """What a certificate may be used for; a device's cannot stand for a broker."""

    CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
    HOST = ExtendedKeyUsageOID.SERVER_AUTH


class Issuer(NamedTuple):
    """The authority's certificate and private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, PKCS 8, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def read_key(path: Path, remedy: str) -> ec.EllipticCurvePrivateKey:
    """A P-256 private key that only its owner can read. Raises IdentityError."""
    data = read(path, remedy)
    check_private(path)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"{path}: no private key; {remedy}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: no P-256 key; {remedy}")
    return key


def read_certificate(path: Path, remedy: str) -> x509.Certificate:
    """A certificate in PEM. Raises IdentityError."""
    try:
        return x509.load_pem_x509_certificate(read(path, remedy))
    except ValueError as error:
        raise IdentityError(f"{path}: no certificate; {remedy}") from error


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority signed it."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def authority(name: str, now: datetime, valid: timedelta) -> Issuer:
    """A new self-signed authority that issues no further authorities."""
    key, subject = new_key(), _name(name)
    usage = x509.KeyUsage(**{**_NOTHING, "key_cert_sign": True, "crl_sign": True})
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + valid)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    return Issuer(certificate, key)


def issue(
    issuer: Issuer, name: str, key: ec.EllipticCurvePublicKey, purpose: Purpose, now: datetime,
    valid: timedelta, hosts: Sequence[str] = (),
) -> x509.Certificate:  # fmt: skip
    """A certificate for `name`, never beyond its issuer's end; `hosts` are names and addresses."""
    ends = min(now + valid, issuer.certificate.not_valid_after_utc)
    usage = x509.KeyUsage(**{**_NOTHING, "digital_signature": True})
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    builder = (
        x509.CertificateBuilder(
            issuer.certificate.subject, _name(name), key, x509.random_serial_number()
        )
        .not_valid_before(now - BACKDATED)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose.value]), critical=True)
        .add_extension(identifier, critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer.key, SHA256())


def check_host(host: str) -> None:
    """Raise AuthorityError unless a certificate can name this host: an address, or letters."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            raise AuthorityError(
                f"--host {host!r}: write an address or a host name of letters, digits, '-' and "
                "'.', e.g. 192.168.1.10; IPv6 without brackets"
            ) from None


def revocation_list(
    issuer: Issuer, revoked: Iterable[tuple[int, datetime]], now: datetime
) -> bytes:  # fmt: skip
    """The revoked serial numbers and when, as PEM; valid as long as the authority.

    A broker refuses everybody when its list has run out, so it is not made to.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(now - BACKDATED)
        .next_update(issuer.certificate.not_valid_after_utc)
    )
    for serial, when in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        )
    return builder.sign(issuer.key, SHA256()).public_bytes(Encoding.PEM)


def request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signing request for `name`, PEM: it proves that who asks has the key."""
    builder = x509.CertificateSigningRequestBuilder(_name(name))
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_request(data: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """Name and key of a signing request. Raises EnrolmentError with the reason."""
    try:
        wanted = x509.load_pem_x509_csr(data)
    except ValueError as error:
        raise EnrolmentError("no signing request in PEM") from error
    try:
        key, name = wanted.public_key(), common_name(wanted.subject)
        signed = wanted.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnrolmentError("the signing request is damaged") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EnrolmentError("the signing request is for no P-256 key")
    if not signed:
        raise EnrolmentError("the signing request is not signed by its key")
    return name, key


def common_name(name: x509.Name) -> str:
    """The one common name, or nothing."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, hexadecimal."""
    digest = Hash(SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def utc(unix_s: float) -> datetime:
    """Unix time as certificates hold it, in whole seconds."""
    return datetime.fromtimestamp(int(unix_s), UTC)


def _name(name: str) -> x509.Name:
    if not 0 < len(name) <= _NAME_MAX:
        raise IdentityError(f"{name!r}: a name in a certificate has 1 to {_NAME_MAX} characters")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
