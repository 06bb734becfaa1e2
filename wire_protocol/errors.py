"""Errors of the wire protocol, and the root of every musplit error.

MusplitError                 exit code 1
|- InputError                3  a file, field or value handed in is wrong
|  |- IdentityError          certificate, key or CA are missing, readable by others, or unusable
|- TransportError            4  the broker cannot be reached, or was lost for too long
|  |- QueueFullError         more messages wait for the broker than the link holds
|- RefusedError              5  the other side said no, with its reason
|- StalledError              6  nothing happened within a documented bound
|- UnmeasuredError           8  measured energy was required, and is not there
|- ProtocolError             3  bytes from the network are not what the protocol allows
   |- ChecksumError             the CRC-32 does not match
   |- TruncatedError            fewer bytes than the header promises
   |- HeaderError               a header field is out of its range, or lies about the size
   |- MessageError              a control message is malformed

Rooms derive their own errors from these, so that a command knows its exit code.
"""

from __future__ import annotations


class MusplitError(Exception):
    """Base of all errors a user may see; the text is one line: what, where, what to do."""

    exit_code = 1


class InputError(MusplitError):
    """A file, a field or a value handed in by the user is wrong."""

    exit_code = 3


class IdentityError(InputError):
    """Certificate, key or CA are missing, readable by others, or cannot be used."""


class TransportError(MusplitError):
    """The broker cannot be reached, refuses the connection, or was lost for too long."""

    exit_code = 4


class QueueFullError(TransportError):
    """The broker takes messages too slowly: this one was not queued."""


class RefusedError(MusplitError):
    """The other side refused, with its reason."""

    exit_code = 5


class StalledError(MusplitError):
    """Nothing happened within a documented bound."""

    exit_code = 6


class UnmeasuredError(MusplitError):
    """Measured energy was required, and is not there."""

    exit_code = 8


class ProtocolError(MusplitError):
    """Bytes from the network are not what the protocol allows."""

    exit_code = 3


class ChecksumError(ProtocolError):
    """The CRC-32 does not match the bytes."""


class TruncatedError(ProtocolError):
    """Fewer bytes than the header promises."""


class HeaderError(ProtocolError):
    """A header field is out of its range, or lies about the size."""


class MessageError(ProtocolError):
    """A control message is malformed."""
