"""Jetson boards: a tar over the root file system, and the vendor's command that flashes it.

The same folder as on a boot partition, at /opt/musplit-seed, and a unit that installs it once.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from firmware_profiles.errors import FlashError
from firmware_profiles.provision.seed import FOLDER, SECRETS, Seed
from firmware_profiles.schema import Profile

_UNIT: Final = "etc/systemd/system/musplit-install.service"
_WANTED: Final = "etc/systemd/system/multi-user.target.wants/musplit-install.service"
_SEED: Final = "opt/musplit-seed"
# Board configurations of the vendor's flash.sh, for developer kits that boot from their card or
# module; NVMe roots are flashed by l4t_initrd_flash.sh.
_TARGETS: Final = {
    "jetson-nano": "jetson-nano-devkit mmcblk0p1",
    "jetson-xavier-nx": "jetson-xavier-nx-devkit mmcblk0p1",
    "jetson-orin-nano": "jetson-orin-nano-devkit mmcblk0p1",
    "jetson-agx-orin": "jetson-agx-orin-devkit mmcblk0p1",
}
INSTALL_UNIT: Final = f"""\
# Written by musplit flash. Installs the device program once, at the first boot.

[Unit]
Description=musplit installer
ConditionPathExists=/{_SEED}/install.sh
After=local-fs.target
Before=musplit-device.service

[Service]
Type=oneshot
ExecStart=/bin/sh /{_SEED}/install.sh
# Once it is through: later boots must not undo what was installed or set since.
ExecStartPost=/bin/rm -rf /{_SEED}
RemainAfterExit=yes

[Install]
WantedBy=multi-user.target
"""


def overlay_bytes(seed: Seed) -> bytes:
    """The tar: equal orders give equal bytes; all belongs to root, secrets to nobody else."""
    files: dict[str, bytes] = {
        f"{_SEED}/{name.removeprefix(f'{FOLDER}/')}": _bytes(data)
        for name, data in seed.files.items()
    }
    secrets = {f"{_SEED}/{name.removeprefix(f'{FOLDER}/')}" for name in SECRETS}
    files[_UNIT] = INSTALL_UNIT.encode()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        # The folder is listed first, for its mode: nobody but root looks into it.
        folder = tarfile.TarInfo(_SEED)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(folder)
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o600 if name in secrets else 0o644
            archive.addfile(entry, io.BytesIO(files[name]))
        link = tarfile.TarInfo(_WANTED)
        link.type, link.linkname = tarfile.SYMTYPE, "/" + _UNIT
        archive.addfile(link)
    return stream.getvalue()


def write_overlay(path: Path, data: bytes) -> bool:
    """True when the file was written, False when it held just this. It may hold a token: 0600."""
    try:
        if path.exists() and path.read_bytes() == data:
            return False
        temporary = path.with_name(path.name + ".new")
        temporary.unlink(missing_ok=True)  # of an earlier run, or with another mode
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        temporary.replace(path)
    except OSError as error:
        raise FlashError(f"--overlay {path}: cannot be written ({error.strerror})") from error
    return True


def flash_commands(profile: Profile, path: Path) -> list[str]:
    """What a person types in the vendor's Linux_for_Tegra folder; needs the board."""
    board = next(
        (target for name, target in _TARGETS.items() if profile.name.startswith(name)),
        "BOARD mmcblk0p1",
    )
    return [
        f"sudo tar --numeric-owner -xpf {path.resolve()} -C Linux_for_Tegra/rootfs",
        f"cd Linux_for_Tegra && sudo ./flash.sh {board}",
    ]


def overlay_names(seed: Seed) -> Mapping[str, int]:
    """Name -> bytes of what the tar holds, for a dry run."""
    names = {
        f"{_SEED}/{name.removeprefix(f'{FOLDER}/')}": len(_bytes(data))
        for name, data in seed.files.items()
    }
    return {**names, _UNIT: len(INSTALL_UNIT), _WANTED: 0}


def _bytes(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data
