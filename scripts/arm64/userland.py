"""The userland: emulator, root, wheels; and commands that run in it as a named processor."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from scripts.arm64.cache import UnavailableError, cached
from scripts.arm64.debian import Archive, Package

ROOT: Final = Path(__file__).resolve().parents[2]
# Always one of these: the emulator's default processor has every extension, and hides crashes.
CPUS: Final = ("cortex-a53", "cortex-a72", "cortex-a76")
# The release of Raspberry Pi OS "Bookworm", and the Python in it.
RELEASE: Final = "bookworm"
PYTHON: Final = "3.11"
# Version 7 of the emulator, in bookworm, crashes in wheels that boards run; this release has 10.
_EMULATOR_RELEASE: Final = "trixie"
_FORMAT: Final = 1  # of the folders; changes when the way they are built does
_INCLUDED: Final = ("python3", "python3-venv", "libstdc++6", "libgomp1", "ca-certificates")
_HOSTS: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_PLATFORMS: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_MERGED: Final = ("bin", "sbin", "lib")


class Userland(NamedTuple):
    """Paths of a built userland."""

    emulator: Path  # qemu-aarch64, static
    root: Path  # the arm64 system
    site: Path  # the unpacked wheels

    def python(self, cpu: str) -> list[str]:
        """The command of an arm64 Python on `cpu`; needs `environment`.

        Files are looked up in the root first, then on the host. Programs cannot be started from
        inside, as the host's kernel does not run them: `inside` is for that.
        """
        python = self.root / "usr" / "bin" / f"python{PYTHON}"
        # -S: no site-packages of the root, the wheels come by PYTHONPATH.
        return [str(self.emulator), "-cpu", cpu, "-L", str(self.root), str(python), "-S"]

    def environment(self, *paths: Path) -> dict[str, str]:
        """The environment of `python`: this one, with `paths` and the wheels to import from."""
        imported = os.pathsep.join(map(str, (*paths, self.site)))
        return {
            **os.environ, "PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": imported,
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def inside(self, cpu: str, root: Path, binds: Sequence[str] = ()) -> list[str]:
        """A prefix that runs a command with `root`, a copy of this root, as its file system.

        By proot: no privileges, and programs start programs. `binds` are HOST:INSIDE paths.
        Raises UnavailableError where proot is not installed.
        """
        proot = shutil.which("proot")
        if proot is None:
            raise UnavailableError("proot is not installed (package proot)")
        shared = ("/dev", "/proc", "/sys", "/etc/resolv.conf", *binds)
        bound = [part for bind in shared for part in ("-b", bind)]
        # -0: as root, seen from inside.
        emulator = f"{self.emulator} -cpu {cpu}"
        return [proot, "-q", emulator, "-r", str(root), "-0", *bound, "-w", "/"]

    def copy_root(self, folder: Path) -> Path:
        """A copy of the root to write into; `folder` must not exist."""
        shutil.copytree(self.root, folder, symlinks=True)
        return folder


def userland(pins: Mapping[str, str]) -> Userland:
    """The userland with the device program's wheels, built on the first call (a minute).

    `pins` (name to version) stand before constraints.txt. Raises UnavailableError with the reason.
    """
    host = _HOSTS.get(platform.machine()) if sys.platform == "linux" else None
    if host is None:
        raise UnavailableError(f"no emulator for {sys.platform} on {platform.machine()}")
    wanted = requirements(pins)
    key = hashlib.sha256("\n".join((PYTHON, *wanted)).encode()).hexdigest()[:12]
    emulator = cached(
        f"emulator-{_EMULATOR_RELEASE}-{host}-{_FORMAT}", lambda folder: _emulator(folder, host)
    )
    return Userland(
        emulator / "usr" / "bin" / "qemu-aarch64",
        cached(f"root-{RELEASE}-{_FORMAT}", _root),
        cached(f"wheels-{PYTHON}-{key}-{_FORMAT}", lambda folder: _wheels(folder, wanted)),
    )


def requirements(pins: Mapping[str, str]) -> list[str]:
    """What the plain install asks for, each at the version of `pins` or of constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    known = {**dict(line.split("==") for line in lines), **pins}
    names = [re.split(r"[<>=!~; \[]", text, maxsplit=1)[0] for text in project["dependencies"]]
    return [f"{name}=={known[name]}" for name in sorted(names)]


def _emulator(folder: Path, host: str) -> None:
    archive = Archive(_EMULATOR_RELEASE, host)
    # Static: what it depends on is not needed.
    package = [p for p in archive.closure(["qemu-user"]) if p.name == "qemu-user"]
    archive.unpack(package, folder, only="./usr/bin/qemu-aarch64")
    _note(folder, package)


def _root(folder: Path) -> None:
    archive = Archive(RELEASE, "arm64")
    packages = archive.closure(_INCLUDED, essential=True)
    for name in _MERGED:
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")
    archive.unpack(packages, folder)
    _finish(folder)
    _note(folder, packages)


def _finish(folder: Path) -> None:
    """What the packages' scripts would have left, as far as it is needed."""
    for name in ("passwd", "group"):
        shutil.copyfile(folder / f"usr/share/base-passwd/{name}.master", folder / "etc" / name)
    for link, target in (("sh", "dash"), ("awk", "mawk")):
        if not (folder / "usr/bin" / link).is_symlink():
            (folder / "usr/bin" / link).symlink_to(target)
    certificates = sorted((folder / "usr/share/ca-certificates").rglob("*.crt"))
    bundle = folder / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_bytes(b"".join(path.read_bytes() for path in certificates))


def _wheels(folder: Path, wanted: Sequence[str]) -> None:
    """Unpack the aarch64 wheels of `wanted` and of what they need."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--only-binary=:all:", "--no-compile", f"--python-version={PYTHON}", "--implementation=cp",
         *(f"--platform={platform}_aarch64" for platform in _PLATFORMS),
         "--target", str(folder), *wanted],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), "no reason given")
        raise UnavailableError(f"the aarch64 wheels cannot be installed: {reason}")


def _note(folder: Path, packages: Sequence[Package]) -> None:
    lines = sorted(f"{package.name} {package.version}" for package in packages)
    (folder / "musplit-packages.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
