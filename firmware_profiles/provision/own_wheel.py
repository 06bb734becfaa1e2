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
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
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
    source = _source_tree()
    return _repack(_installed(), folder) if source is None else _build(source, folder)


def own_digest() -> str:
    """SHA-256 of what the wheel is made of, which says whether a wheel is still this musplit's."""
    source = _source_tree()
    digest = hashlib.sha256()
    if source is None:
        content = [(str(path), path.read_binary()) for path in _own_files(_installed())]
    else:
        paths = [path for part in _parts(source) for path in _files(source / part)]
        content = [(str(path.relative_to(source)), path.read_bytes()) for path in paths]
    for name, data in sorted(content):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _source_tree() -> Path | None:
    """Where this musplit is run from its sources, an editable installation included."""
    source = Path(firmware_profiles.__file__).resolve().parents[1]
    return source if (source / "pyproject.toml").is_file() else None


def _installed() -> Distribution:
    try:
        return distribution("musplit")
    except PackageNotFoundError as error:
        raise WheelhouseError("musplit is not installed here; pip install it first") from error


def _parts(source: Path) -> list[str]:
    """The files and folders that a wheel is built from."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    return ["pyproject.toml", "README.md", "LICENSE", *sorted(packages)]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = (entry for entry in path.rglob("*") if entry.is_file())
    return [entry for entry in found if "__pycache__" not in entry.parts]


def _build(source: Path, folder: Path) -> Path:
    """From a source tree; a copy of it, because setuptools writes beside what it builds."""
    copy = folder / "source"
    copy.mkdir()
    for part in _parts(source):
        for path in _files(source / part):
            target = copy / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    run_pip(
        "wheel", "--no-deps", "--wheel-dir", str(folder), str(copy),
        variables={"SOURCE_DATE_EPOCH": _EPOCH_UNIX_S},
    )  # fmt: skip
    shutil.rmtree(copy)
    (wheel,) = folder.glob("musplit-*.whl")
    return wheel


def _own_files(installed: Distribution) -> list[PackagePath]:
    """The files of an installation, without those that the installer added."""
    return sorted(
        path
        for path in installed.files or []
        if path.name not in _INSTALLER_FILES and path.suffix != ".pyc" and ".." not in path.parts
    )


def _repack(installed: Distribution, folder: Path) -> Path:
    """From the files that an installer unpacked."""
    info = f"musplit-{installed.version}.dist-info"
    wheel = folder / f"musplit-{installed.version}-py3-none-any.whl"
    lines: list[str] = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _own_files(installed):
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
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
            capture_output=True, text=True, check=False, timeout=_BUILD_S,
            env={**os.environ, **(variables or {})},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise WheelhouseError(
            f"pip {arguments[0]}: not through after {_BUILD_S:g} s; run it again, what was "
            "downloaded is kept"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[0]
        raise WheelhouseError(f"pip {arguments[0]}: {reason.removeprefix('ERROR: ')}")
