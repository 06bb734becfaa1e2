"""Errors of the board profiles.

wire_protocol.errors.InputError
|- ProfileError    a profile is unknown, cannot be read, or a field of it is wrong
"""

from __future__ import annotations

from wire_protocol.errors import InputError


class ProfileError(InputError):
    """A profile is unknown, cannot be read, or a field of it is wrong."""
