"""Errors of the studies.

wire_protocol.errors.InputError
|- StudyError  a study file is wrong, or its folder is in use; names file and field
wire_protocol.errors.MusplitError
|- CellError   one run of a study failed; the others go on
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError


class StudyError(InputError):
    """A study file is wrong, or its folder is in use."""


class CellError(MusplitError):
    """One run of a study failed; the others go on."""
