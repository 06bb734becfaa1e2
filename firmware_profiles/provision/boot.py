"""The boot partition: a mounted folder, or a FAT partition inside an image file.

Images go through mtools, which needs neither root nor a mount. Nothing is written that is there
already, so that a second run leaves every byte alone, times included.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final, Protocol

from firmware_profiles.errors import FlashError

_SECTOR_BYTES: Final = 512
_TABLE: Final = struct.Struct("<B3xB3xII")  # active, type, first sector, sectors
_FAT_TYPES: Final = {0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF}
_SIGNATURE: Final = b"\x55\xaa"
_GPT: Final = 0xEE
_COMPRESSED: Final = (b"\xfd7zXZ\0", b"\x1f\x8b", b"PK", b"\x28\xb5\x2f\xfd")  # xz, gzip, zip, zstd
_COMMAND_S: Final = 600.0


class Boot(Protocol):
    """A boot partition; names are relative, with '/'."""

    where: str
    then: str  # what a person does next

    def names(self, folder: str = "") -> set[str]:
        """The names in a folder; none when it is missing."""

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None when it is missing."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, and the folders above it."""

    def remove(self, name: str) -> None:
        """Remove a file that is there."""

    def free_bytes(self) -> int:
        """Room that is left."""


class FolderBoot:
    """A mounted boot partition."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self.then = f"umount {folder}, and put the card into the board"
        self._folder = folder
        if not folder.is_dir():
            raise FlashError(f"--boot-dir {folder}: no folder; mount the card's first partition")

    def names(self, folder: str = "") -> set[str]:
        """The names in a folder."""
        path = self._folder / folder
        return {entry.name for entry in path.iterdir()} if path.is_dir() else set()

    def read(self, name: str) -> bytes | None:
        """A file's bytes."""
        path = self._folder / name
        return path.read_bytes() if path.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        """Written beside, synced and renamed: a card that is pulled out keeps the old file."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self._folder / name).unlink()

    def free_bytes(self) -> int:
        """Room that is left."""
        return shutil.disk_usage(self._folder).free


class ImageBoot:
    """The first FAT partition of an image file. Raises FlashError when there is none."""

    def __init__(self, image: Path) -> None:
        self.where = str(image)
        self.then = f"write {image} to a card (Raspberry Pi Imager, no customisation; or dd)"
        if shutil.which("mcopy") is None:
            raise FlashError(
                "--image needs mtools: install it (apt install mtools, brew install mtools), or "
                "write the card, mount its first partition and give --boot-dir"
            )
        offset = _fat_offset(image)
        self._drive = f"{image}@@{offset}"

    def names(self, folder: str = "") -> set[str]:
        """The names in a folder."""
        done = self._mtools("mdir", "-b", f"::/{folder}")
        if done.returncode:
            return set()
        lines = done.stdout.decode().splitlines()
        return {line.rstrip("/").rpartition("/")[2] for line in lines if line.strip()}

    def read(self, name: str) -> bytes | None:
        """A file's bytes."""
        folder, _, base = name.rpartition("/")
        if base not in self.names(folder):
            return None
        return self._must("mtype", f"::/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file, and the folders above it."""
        parents = name.split("/")[:-1]
        for depth, folder in enumerate(parents):
            if folder not in self.names("/".join(parents[:depth])):
                self._must("mmd", "::/" + "/".join(parents[: depth + 1]))
        self._must("mcopy", "-o", "-", f"::/{name}", data=data)

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._must("mdel", f"::/{name}")

    def free_bytes(self) -> int:
        """Room that is left: mdir's last line, `29 347 328 bytes free`."""
        last = self._must("mdir", "::/").decode(errors="replace").strip().splitlines()[-1]
        return int("".join(filter(str.isdigit, last)) or 0)

    def _must(self, program: str, *arguments: str, data: bytes = b"") -> bytes:
        done = self._mtools(program, *arguments, data=data)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines() or [
                "no reason given"
            ]
            raise FlashError(f"{self.where}: {program} {arguments[-1]}: {reason[-1]}")
        return done.stdout

    def _mtools(
        self, program: str, *arguments: str, data: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        # MTOOLSRC: a user's own drive letters play no part; long names need no upper case.
        environment = {**os.environ, "MTOOLSRC": os.devnull, "MTOOLS_SKIP_CHECK": "1"}
        try:
            return subprocess.run(
                [program, "-i", self._drive, *arguments], input=data, capture_output=True,
                check=False, timeout=_COMMAND_S, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise FlashError(
                f"{self.where}: {program} is not through after {_COMMAND_S:g} s; the disk may be "
                "too slow or failing: copy the image to another one"
            ) from error


def _fat_offset(image: Path) -> int:
    """Bytes before the first FAT partition of a partition table. Raises FlashError."""
    try:
        with image.open("rb") as file:
            record = file.read(_SECTOR_BYTES)
    except OSError as error:
        raise FlashError(f"--image {image}: cannot be read ({error.strerror})") from error
    if record.startswith(_COMPRESSED):
        raise FlashError(f"--image {image}: compressed; unpack it first (xz -dk, unzip)")
    if len(record) < _SECTOR_BYTES or record[-2:] != _SIGNATURE:
        raise FlashError(f"--image {image}: has no partition table; give the whole card's image")
    entries = [_TABLE.unpack_from(record, 446 + 16 * index) for index in range(4)]
    if any(kind == _GPT for _, kind, _, _ in entries):
        raise FlashError(
            f"--image {image}: a GPT table; images of Raspberry Pi boards have an MBR. Jetson "
            "boards take --overlay or --ssh"
        )
    for _, kind, first, sectors in entries:
        if kind in _FAT_TYPES and sectors:
            if image.stat().st_size < (first + sectors) * _SECTOR_BYTES:
                raise FlashError(
                    f"--image {image}: ends within its boot partition, so a part is missing; "
                    "download or unpack it again"
                )
            return int(first) * _SECTOR_BYTES
    raise FlashError(f"--image {image}: has no FAT partition, so it does not boot a Raspberry Pi")
