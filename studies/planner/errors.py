"""Errors of the planner.

wire_protocol.errors.InputError
|- FleetFileError   a fleet file is wrong; names the field
|- TableError       a file of measured rounds is damaged
wire_protocol.errors.MusplitError
|- NoPlanError      a limit forbids every candidate, or none reached the target
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError


class FleetFileError(InputError):
    """A fleet file is wrong."""


class TableError(InputError):
    """A file of measured rounds is damaged."""


class NoPlanError(MusplitError):
    """A limit forbids every candidate, or none reached the target."""
