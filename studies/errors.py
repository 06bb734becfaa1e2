"""Errors of studies.

wire_protocol.errors.InputError
|- StudyError       a baseline's name or option is wrong
"""

from __future__ import annotations

from wire_protocol.errors import InputError


class StudyError(InputError):
    """A baseline's name or option is wrong."""
