"""A folder that is built once: several builders wait for one, and none sees it half done."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

_NAME: Final = "musplit/arm64"


class UnavailableError(Exception):
    """The userland cannot be had here; the text is one line that says why."""


def cache_folder() -> Path:
    """The user's cache (XDG base directories), `musplit/arm64` in it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / _NAME


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills an empty one when it is not there.

    It appears by one rename. Whoever comes while it is built waits.
    Raises what `build` raises, and then leaves nothing.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            build(made)
            made.chmod(0o755)
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return folder
