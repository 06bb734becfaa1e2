"""Errors of the board's program.

wire_protocol.errors.InputError
|- ShardError    the data shard cannot be read, or does not fit the model
|- BundleError   the client bundle is missing, damaged, or another one
|- StateError    the state folder cannot be used
|- PaceError     this machine cannot stand for a board, or the file about it is wrong
|- MeterError    a power meter cannot be read, or is not what was named
|- GapError      readings of a meter are missing: the window has no energy
"""

from __future__ import annotations

from wire_protocol.errors import InputError


class ShardError(InputError):
    """The data shard cannot be read, or does not fit the model."""


class BundleError(InputError):
    """The client bundle is missing, damaged, or another one than the run's."""


class StateError(InputError):
    """The state folder cannot be used."""


class PaceError(InputError):
    """A board that this machine cannot stand for, or a wrong file that says which."""


class MeterError(InputError):
    """A power meter cannot be read, or is not what was named."""


class GapError(MeterError):
    """Too few readings of a meter: the window has no energy."""
