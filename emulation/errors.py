"""Errors of emulation.

wire_protocol.errors.MusplitError
|- FleetError        a process of the emulated fleet ended when it should not have
wire_protocol.errors.InputError
|- ListenError       the embedded broker may not, or cannot, listen there
|- FitError          a run folder's times cannot be taken over
|- FleetFileError    a fleet file is wrong, or this machine cannot stand for a board of it
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError


class FleetError(MusplitError):
    """A process of the emulated fleet ended when it should not have; its exit code is passed on."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = code if code > 0 else 1  # negative: it was killed by a signal


class ListenError(InputError):
    """The embedded broker may not, or cannot, listen there."""


class FitError(InputError):
    """A run folder's times cannot be taken over into a simulation."""


class FleetFileError(InputError):
    """A fleet file is wrong, or this machine cannot stand for a board of it."""
