"""Errors of the export.

wire_protocol.errors.InputError
|- ModelError    the model cannot be found, built, or traced
|- CutError      the model cannot be cut there
|- HalfError     the server half's folder is missing, damaged, or another one
wire_protocol.errors.MusplitError
|- ParityError   the exported graph does not compute what torch computes
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError


class ModelError(InputError):
    """The model cannot be found, built, or traced."""


class CutError(InputError):
    """The model cannot be cut there."""


class HalfError(InputError):
    """The server half's folder is missing, damaged, or another one."""


class ParityError(MusplitError):
    """The exported graph does not compute what torch computes."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
