"""Errors of the studies.

wire_protocol.errors.InputError
|- StudyError  a study file, or a baseline's name or option, is wrong, or a folder is in use
wire_protocol.errors.MusplitError
|- CellError   one run of a study failed; the others go on
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError


class StudyError(InputError):
    """A study file, or a baseline's name or option, is wrong, or a folder is in use."""


class CellError(MusplitError):
    """One run of a study failed; the others go on."""
