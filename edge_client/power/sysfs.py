"""Small files of the kernel, read again and again: one number, or one line, each."""

from __future__ import annotations

import os
from pathlib import Path

from edge_client.errors import MeterError


def read_line(path: Path) -> str:
    """The file's text without white space around it; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_number(path: Path) -> float:
    """The number in the file. Raises MeterError that names the file and the reason.

    Without Python's buffers: the sampler does this ten times a second.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            text = os.read(handle, 64)
        finally:
            os.close(handle)
    except PermissionError as error:
        raise MeterError(
            f"{path}: permission denied; run as root, or once: chmod a+r {path}"
        ) from error
    except OSError as error:
        raise MeterError(f"{path}: the sensor is gone ({error.strerror})") from error
    try:
        return float(int(text))
    except ValueError as error:
        raise MeterError(f"{path}: holds {text[:20]!r}, no number") from error
