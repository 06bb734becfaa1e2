"""Errors of identity.

wire_protocol.errors.IdentityError
|- AuthorityError   3  the folder of the lab's authority is missing, damaged, or exists already
wire_protocol.errors.RefusedError
|- EnrolmentError   5  the authority refused a token or a request, with its reason
wire_protocol.errors.MusplitError
|- UntrustedError   7  a bundle is unsigned, altered, or signed by somebody else
"""

from __future__ import annotations

from wire_protocol.errors import IdentityError, MusplitError, RefusedError


class AuthorityError(IdentityError):
    """The folder of the lab's authority is missing, damaged, or exists already."""


class EnrolmentError(RefusedError):
    """The authority refused a token or a request; the text is the reason."""


class UntrustedError(MusplitError):
    """A bundle is unsigned, altered, or signed by somebody else."""

    exit_code = 7
