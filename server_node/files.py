"""Files of a run folder that survive a power cut, and the lock that keeps two servers apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from server_node.errors import ConfigError

CONFIG_FILE: Final = "config.toml"
CONTROL_FOLDER: Final = "control"
LOCK_FILE: Final = "lock"


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a new file, sync it and give it the name: there is the old or the new one.

    Raises OSError; the old file is kept then.
    """
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk: a new file is only found again after this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make FOLDER and hold it for this server. Raises ConfigError when another one does.

    The kernel releases the lock when its holder ends, in whatever way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder}: another server uses this run folder; stop that one first"
            ) from error
        yield
