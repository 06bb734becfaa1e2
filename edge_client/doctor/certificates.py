"""The identity folder: can its files be used together, and how long are they valid."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from edge_client.doctor.findings import Findings, error, ok, warning
from identity.certificates import issued_by, read_certificate
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
    if not issued_by(
        read_certificate(files.certificate, _ENROL), read_certificate(files.ca, _ENROL)
    ):
        yield error(
            "identity", f"{files.certificate} is not from the CA in {files.ca}",
            "the broker of that lab does not take it", _ENROL,
        )  # fmt: skip
        return
    yield ok("identity", f"certificate, key and CA in {files.folder} belong together")
    for check, path, remedy in (
        ("certificate", files.certificate, _ENROL),
        ("ca-certificate", files.ca, "the lab makes a new CA, and every machine enrols anew"),
    ):  # fmt: skip
        certificate = read_certificate(path, remedy)
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
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
