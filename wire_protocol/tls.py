"""TLS 1.3 with mutual authentication: the files a link needs, and what a failed handshake means."""

from __future__ import annotations

import ssl
import stat
import time
from pathlib import Path
from typing import Final, NamedTuple

from wire_protocol.errors import IdentityError
from wire_protocol.events import Address

CA_FILE: Final = "ca.pem"
CERTIFICATE_FILE: Final = "device.pem"
KEY_FILE: Final = "device.key"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
# What a broker answers a certificate with (RFC 8446, 6.2), in words of OpenSSL: cause and remedy.
_ALERTS: Final = {
    "certificate required": "it wants a certificate and got none; give --identity DIR",
    "certificate revoked": "our certificate was revoked; ask for a token and enrol anew",
    "certificate expired": "our certificate has expired, or a clock is wrong; enrol anew ({now})",
    "unknown ca": "our certificate is not from its CA; enrol with the lab's CA",
    "unsupported certificate": "our certificate is for another purpose; enrol this machine",
    "bad certificate": "it does not take our certificate, or a clock is wrong ({now})",
    "certificate unknown": "it does not take our certificate; enrol anew",
    "protocol version": "it does not speak TLS 1.3",
    "handshake failure": "it does not take our certificate, or wants other ciphers",
}
_COMMON_NAME: Final = b"\x06\x03\x55\x04\x03"  # its object identifier in DER
_NOT_YET_VALID: Final = 9  # X509_V_ERR_*, openssl/x509_vfy.h
_EXPIRED: Final = 10
_WRONG_CA: Final = (2, 7, 18, 19, 20, 21)
_PURPOSE: Final = 26


class TlsFiles(NamedTuple):
    """PEM files of one side: whom it trusts, who it is, and its private key."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def in_folder(cls, folder: Path) -> TlsFiles:
        """Those of an identity folder."""
        return cls(folder / CA_FILE, folder / CERTIFICATE_FILE, folder / KEY_FILE)

    @property
    def folder(self) -> Path:
        """The identity folder: keys of signatures lie beside the certificate's."""
        return self.key.parent

    def context(self) -> ssl.SSLContext:
        """TLS 1.3 as a client that shows its certificate. Raises IdentityError."""
        check_private(self.key)
        context = trusting(self.ca)
        load_own(context, self.certificate, self.key)
        return context


def trusting(ca: Path) -> ssl.SSLContext:
    """TLS 1.3 as a client that trusts `ca` alone, and checks names. Raises IdentityError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False  # that is a device's name, no host's
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(
            f"{ca}: no CA certificate ({_plain(error)}); copy the lab's ca.pem there"
        ) from error
    return context


def load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Have `context` show a certificate. Raises IdentityError."""
    try:
        # A password given, OpenSSL asks nobody for that of an encrypted key.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(
            f"{certificate}: certificate and key {key.name} cannot be used ({_plain(error)}); "
            "enrol this machine: musplit enroll"
        ) from error


def check_private(key: Path) -> None:
    """Raise IdentityError unless only its owner can read the file `key`."""
    try:
        mode = key.stat().st_mode
    except OSError as error:
        raise IdentityError(
            f"{key}: cannot be read ({error.strerror}); enrol this machine: musplit enroll"
        ) from error
    if mode & _OTHERS:
        raise IdentityError(
            f"{key}: others can read this secret (mode {stat.S_IMODE(mode):03o}); chmod 600 {key}"
        )


def own_name(certificate: Path) -> str:
    """The common name in a certificate of the lab, or nothing; only to tell of a mistake early.

    In DER the subject's comes last. Raises IdentityError.
    """
    try:
        der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"{certificate}: no certificate here; enrol this machine: musplit enroll"
        ) from error
    _, found, rest = der.rpartition(_COMMON_NAME)
    return rest[2 : 2 + rest[1]].decode("utf-8", "replace") if found and len(rest) > 1 else ""


def tls_for(address: Address, identity: Path | None, *, insecure: bool) -> TlsFiles | None:
    """The files to speak TLS with, or None for a plain link, which is refused beyond loopback.

    Raises IdentityError.
    """
    if identity is not None and insecure:
        raise IdentityError("--insecure and --identity exclude each other: give one")
    if identity is None and not insecure and not address.is_loopback:
        raise IdentityError(
            f"broker {address}: beyond loopback a certificate is needed; give --identity DIR "
            "(musplit enroll makes one), or type --insecure on a network you trust"
        )
    return None if identity is None else TlsFiles.in_folder(identity)


def explain(error: ssl.SSLError, peer: str) -> str:
    """Why a handshake with `peer` failed, and what to do: one line."""
    now = time.strftime("this machine's clock says %Y-%m-%d %H:%M UTC", time.gmtime())
    if isinstance(error, ssl.SSLCertVerificationError):
        return _distrust(error, peer, now)
    if isinstance(error, ssl.SSLEOFError):
        return f"{peer} cut the connection before TLS was up; is this the port of its TLS listener?"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    for alert, text in _ALERTS.items():
        if "alert" in reason and alert in reason:
            return f"{peer} refused us: {text.format(now=now)}"
    if "wrong version number" in reason or "packet length" in reason:
        return f"{peer} does not speak TLS there; is this the port of its TLS listener (8883)?"
    return f"TLS with {peer} failed ({reason})"


def _distrust(error: ssl.SSLCertVerificationError, peer: str, now: str) -> str:
    if error.verify_code == _NOT_YET_VALID:
        return (
            f"the certificate of {peer} is not valid yet: {now}; set it (a board without a clock "
            "battery starts in the past: wait for NTP, or timedatectl set-time)"
        )
    if error.verify_code == _EXPIRED:
        return f"the certificate of {peer} has expired: {now}; renew it, or set the clock"
    if error.verify_code in _WRONG_CA:
        return f"the certificate of {peer} is not from the CA in {CA_FILE}: another lab, or a fraud"
    if error.verify_code == _PURPOSE:
        return f"the certificate of {peer} is a device's, no broker's: a fraud"
    return (
        f"the certificate of {peer} does not fit ({error.verify_message}); name it by an address "
        "in its certificate, or add this one: musplit ca broker-config --host"
    )


def _plain(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return error.strerror or str(error)
