"""Memory that is freed and needed again: have the C library keep it."""

from __future__ import annotations

import ctypes
from typing import Final

# mallopt(3), glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
# The largest that glibc takes on 64 bits; its own threshold grows to the same.
_MMAP_BYTES: Final = 32 << 20
_KEPT_BYTES: Final = 64 << 20


def keep_freed_memory() -> bool:
    """Keep up to 64 MiB of freed memory for what is allocated next; False where libc cannot.

    glibc gives freed memory back at once when it is larger than what was freed before, and takes
    it anew page by page: on a virtual machine that took 2 ms per MB, twenty times the copy of a
    frame into it. The highest use of memory stays what it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    return bool(kept)
