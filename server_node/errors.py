"""Errors of the server node.

wire_protocol.errors.InputError
|- ConfigError      a configuration file or --set is wrong; names the field
|- DataError        a data set cannot be read
|- JournalError     a journal is missing, damaged, or of another run
wire_protocol.errors.StalledError
|- LobbyError       not enough devices joined
|- NoProgressError  a round made no progress within its bound
wire_protocol.errors.ProtocolError
|- FrameFaultError  a device's frame does not fit the run
|- NotFiniteError   a device's tensor holds values that are not finite
wire_protocol.errors.MusplitError
|- DivergedError    the run produced values that are not finite, round after round
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError, ProtocolError, StalledError


class ConfigError(InputError):
    """A configuration file or --set is wrong."""


class DataError(InputError):
    """A data set cannot be read."""


class JournalError(InputError):
    """A journal is missing, damaged, or of another run."""


class LobbyError(StalledError):
    """Not enough devices joined within the lobby's time."""


class NoProgressError(StalledError):
    """A round made no progress within its bound."""


class DivergedError(MusplitError):
    """The run produced values that are not finite, round after round."""


class FrameFaultError(ProtocolError):
    """A device's frame does not fit the run: its sender's fault."""


class NotFiniteError(ProtocolError):
    """A device's tensor holds values that are not finite: the steps' fault as likely as its own."""
