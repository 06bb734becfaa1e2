"""The identity folder: can its files be used together, and how long are they valid."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from edge_client.doctor.findings import Findings, error, ok, warning
from wire_protocol.errors import IdentityError
from wire_protocol.tls import TlsFiles

_SOON: Final = timedelta(days=14)
_ENROL: Final = "ask the lab for a token and enrol anew: musplit enroll"


def check_certificates(files: TlsFiles, now: datetime) -> Findings:
    """CA, certificate and key of an identity folder at the time `now` (with time zone)."""
    try:
        files.context()
    except IdentityError as failure:
        what, _, remedy = str(failure).partition("; ")
        yield error("identity", what, "beyond loopback the broker wants a certificate", remedy)
        return
    yield ok("identity", f"certificate, key and CA in {files.folder} belong together")
    for check, path, remedy in (
        ("certificate", files.certificate, _ENROL),
        ("ca-certificate", files.ca, "the lab makes a new CA, and every machine enrols anew"),
    ):  # fmt: skip
        begins, ends = _validity(path)
        day = f"{ends:%Y-%m-%d}"
        if now < begins:
            yield error(
                check, f"not valid before {begins:%Y-%m-%d %H:%M} UTC",
                f"the clock says {now:%Y-%m-%d %H:%M} UTC",
                "set the clock: timedatectl set-ntp true, or set-time",
            )  # fmt: skip
        elif now >= ends:
            yield error(check, f"expired on {day}", "no broker takes it any more", remedy)
        elif ends - now < _SOON:
            days = (ends - now).days
            yield warning(check, f"expires on {day}, in {days} days", "no broker takes it then",
                          remedy)  # fmt: skip
        else:
            yield ok(check, f"valid until {day}")


def _validity(path: Path) -> tuple[datetime, datetime]:
    """From when to when the certificate in the PEM file `path` is valid."""
    from cryptography import x509  # noqa: PLC0415 - many megabytes, for this check only

    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begins.astimezone(UTC), ends.astimezone(UTC)
