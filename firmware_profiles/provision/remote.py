"""A board that runs already: the seed over SSH, and its installer, by the system's own ssh."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Final

from firmware_profiles.errors import FlashError
from firmware_profiles.provision.order import Order
from firmware_profiles.provision.seed import FOLDER, SECRETS, Seed, check_same_device

# Questions of ssh go to the terminal; a wrong host key or a closed port ends it.
_SSH: Final = ("ssh", "-o", "ConnectTimeout=15")
_FOLDER: Final = ".musplit-seed"
_DONE: Final = "/var/lib/musplit-seed.json"
_TRANSFER_S: Final = 3600.0
# What sshd gives the remote shell is one string; nothing of the order stands in it.
_CURRENT: Final = f"cat {_DONE} 2>/dev/null || true"
_UNPACK: Final = f"umask 077 && rm -rf {_FOLDER} && mkdir {_FOLDER} && tar -xf - -C {_FOLDER}"
# The seed holds secrets, and goes whatever becomes of the installation.
_INSTALL: Final = (
    f"$(test $(id -u) -eq 0 || echo sudo -n) sh -c 'sh {_FOLDER}/install.sh && "
    f"install -m 644 {_FOLDER}/flash.json {_DONE}'; code=$?; rm -rf {_FOLDER}; exit $code"
)


def current_record(host: str) -> bytes | None:
    """What the board was set up with; None for a board without musplit. Raises FlashError."""
    return _ssh(host, _CURRENT) or None


def install_over_ssh(host: str, order: Order, seed: Seed) -> bool:
    """True when the board was changed, False when it had just this. Raises FlashError."""
    there = current_record(host)
    check_same_device(there, order, host)
    if there == seed.files[f"{FOLDER}/flash.json"]:
        return False
    _ssh(host, _UNPACK, _packed(seed))
    _ssh(host, _INSTALL)
    return True


def _packed(seed: Seed) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in seed.files.items():
            content = data.read_bytes() if isinstance(data, Path) else data
            entry = tarfile.TarInfo(name.removeprefix(f"{FOLDER}/"))
            entry.size, entry.mode = len(content), 0o600 if name in SECRETS else 0o644
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _ssh(host: str, command: str, data: bytes = b"") -> bytes:
    if host.startswith("-") or not host.isprintable() or " " in host:
        raise FlashError(f"--ssh {host!r}: write HOST or USER@HOST")
    if shutil.which("ssh") is None:
        raise FlashError("--ssh needs the program ssh; install an OpenSSH client")
    try:
        done = subprocess.run(
            [*_SSH, "--", host, command], input=data, capture_output=True, check=False,
            timeout=_TRANSFER_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FlashError(f"--ssh {host}: not through after an hour; run it again") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        errors = [line for line in lines if "error" in line] or lines
        hint = "; allow it in sudoers, or log in as root" if "sudo" in errors[-1] else ""
        raise FlashError(f"--ssh {host}: {errors[-1].strip()}{hint}")
    return done.stdout
