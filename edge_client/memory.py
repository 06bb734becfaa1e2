"""Resident memory of the device program, for reports."""

from __future__ import annotations

import resource
import sys

import psutil


def memory_bytes() -> tuple[int, int]:
    """Resident memory of this process, (now, peak), in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return psutil.Process().memory_info().rss, peak * unit
