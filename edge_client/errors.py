"""Errors of the board's program.

wire_protocol.errors.InputError
|- ShardError    the data shard cannot be read, or does not fit the model
|- BundleError   the client bundle is missing, damaged, or another one
|- StateError    the state folder cannot be used
|- EvidenceError a bench's evidence is damaged, altered, or of another machine
|- GpioError     the GPIO line cannot be driven
wire_protocol.errors.MusplitError
|- BenchError    what a bench measures ended on its own
|- UnmeasuredError  measured energy was required, and there is none
"""

from __future__ import annotations

from wire_protocol.errors import InputError, MusplitError


class ShardError(InputError):
    """The data shard cannot be read, or does not fit the model."""


class BundleError(InputError):
    """The client bundle is missing, damaged, or another one than the run's."""


class StateError(InputError):
    """The state folder cannot be used."""


class EvidenceError(InputError):
    """A folder of evidence is missing something, damaged, altered, or of another machine."""


class GpioError(InputError):
    """The GPIO line that an analyser listens to cannot be driven."""


class BenchError(MusplitError):
    """What is measured ended on its own."""


class UnmeasuredError(MusplitError):
    """Measured energy was required, and there is none."""
