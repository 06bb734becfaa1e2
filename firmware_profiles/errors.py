"""Errors of the board profiles.

wire_protocol.errors.InputError
|- ProfileError     a profile is unknown, cannot be read, or a field of it is wrong
|- WheelhouseError  the offline wheelhouse cannot be built, or is not what its hashes say
|- FlashError       a boot partition or an order for it is wrong, and is left as it was
"""

from __future__ import annotations

from wire_protocol.errors import InputError


class ProfileError(InputError):
    """A profile is unknown, cannot be read, or a field of it is wrong."""


class WheelhouseError(InputError):
    """The offline wheelhouse cannot be built, or is not what its hashes say."""


class FlashError(InputError):
    """A boot partition or an order for it is wrong, and is left as it was."""
