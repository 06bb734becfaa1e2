"""What device and enrolment service say to each other: JSON over HTTPS, POST /enroll.

The device knows the CA beforehand and checks the service's certificate; its token says who it is.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

PATH: Final = "/enroll"
DEFAULT_PORT: Final = 8884
MAX_BYTES: Final = 16 << 10  # of a request, and of an answer

_Pem = Annotated[str, Meta(max_length=4096)]


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """A one-time token, and a signing request for the device's own key."""

    token: Annotated[str, Meta(min_length=1, max_length=200)]
    request: _Pem


class Answer(Struct, frozen=True, forbid_unknown_fields=True):
    """The device's certificate, and the key of the bundles' signatures."""

    certificate: _Pem
    signer: _Pem


class Refusal(Struct, frozen=True, forbid_unknown_fields=True):
    """Why not."""

    error: Annotated[str, Meta(max_length=400)]
