"""musplit's own wheel: built from a source tree, or put together again from an installation."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import firmware_profiles
from firmware_profiles.errors import WheelhouseError

# The first time that a zip file can hold: equal sources give equal bytes.
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_EPOCH_UNIX_S: Final = "315532800"
_INSTALLER_FILES: Final = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "RECORD.jws"}
_BUILD_S: Final = 600.0


def own_wheel(folder: Path) -> Path:
    """Write the wheel of this very musplit into `folder`. Raises WheelhouseError."""
    source = Path(firmware_profiles.__file__).resolve().parents[1]
    if (source / "pyproject.toml").is_file():
        return _build(source, folder)
    try:
        return _repack(distribution("musplit"), folder)
    except PackageNotFoundError as error:
        raise WheelhouseError("musplit is not installed here; pip install it first") from error


def _build(source: Path, folder: Path) -> Path:
    """From a source tree; a copy of it, because setuptools writes beside what it builds."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, copy)
    for name in packages:
        shutil.copytree(
            source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    run_pip(
        "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy),
        variables={"SOURCE_DATE_EPOCH": _EPOCH_UNIX_S},
    )  # fmt: skip
    shutil.rmtree(copy)
    (wheel,) = folder.glob("musplit-*.whl")
    return wheel


def _repack(installed: Distribution, folder: Path) -> Path:
    """From the files that an installer unpacked, without those that it added."""
    paths = [
        path
        for path in installed.files or []
        if path.name not in _INSTALLER_FILES and path.suffix != ".pyc" and ".." not in path.parts
    ]
    info = f"musplit-{installed.version}.dist-info"
    wheel = folder / f"musplit-{installed.version}-py3-none-any.whl"
    lines: list[str] = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(paths):
            data = path.read_binary()
            archive.writestr(_entry(str(path)), data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{path},sha256={digest},{len(data)}")
        lines.append(f"{info}/RECORD,,")
        archive.writestr(_entry(f"{info}/RECORD"), "\n".join(lines) + "\n")
    return wheel


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


def run_pip(*arguments: str, variables: dict[str, str] | None = None) -> None:
    """Run the pip of this interpreter. Raises WheelhouseError with its last line."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True, check=False, timeout=_BUILD_S,
        env={**os.environ, **(variables or {})},
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[0]
        raise WheelhouseError(f"pip {arguments[0]}: {reason.removeprefix('ERROR: ')}")
