"""Resident memory of the device program, for reports."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


def memory_bytes() -> tuple[int, int]:
    """Resident memory of this process, (now, peak), in bytes."""
    return psutil.Process().memory_info().rss, _peak_bytes()


def _peak_bytes() -> int:
    # Linux keeps in ru_maxrss what the parent had held when it started us (getrusage(2), exec);
    # VmHWM (proc(5), kibibytes) is this program's own.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
