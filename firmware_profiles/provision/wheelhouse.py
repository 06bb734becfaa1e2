"""The offline wheelhouse: every wheel that a board needs, its hashes, and pip's own wheel.

requirements.txt  exact versions with their SHA-256, for pip --require-hashes
SHA256SUMS        of everything else, for the installer, before it runs any of it
python, machine   what the wheels are for, e.g. 3.11 and aarch64
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Final, NamedTuple

from firmware_profiles.errors import WheelhouseError
from firmware_profiles.provision.own_wheel import own_digest, own_wheel, run_pip
from firmware_profiles.schema import Image, Profile

REQUIREMENTS: Final = "requirements.txt"
SUMS: Final = "SHA256SUMS"
_MADE_FOR: Final = "made-for.json"
# onnxruntime names them for tools that rewrite graphs; a device imports neither. 7 MB and 1,600
# files less on a card.
_LEFT_OUT: Final = frozenset({"sympy", "mpmath"})
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# glibc of the oldest tag that a wheel may carry; wheels name the oldest glibc they run on.
_OLDEST_GLIBC: Final = 17
# What musplit runs on; an image with another Python says in its remedy how this one gets there.
_PYTHONS: Final = ("3.11", "3.12", "3.13")


class Wheelhouse(NamedTuple):
    """A folder, whole and checked."""

    folder: Path
    wheels: int
    size_bytes: int
    python: str
    machine: str


def build_wheelhouse(profile: Profile, image: Image, folder: Path) -> Wheelhouse:
    """Fill `folder`, or find it filled with just this. Raises WheelhouseError."""
    there = folder.is_dir() and any(folder.iterdir())
    if there and not (folder / _MADE_FOR).is_file():
        raise WheelhouseError(f"{folder}: holds other files; give a folder of its own to --out")
    made_for = {
        "profile": profile.name, "image": image.name, "python": board_python(image),
        "machine": profile.cpu.architecture, "glibc": image.glibc,
        "onnxruntime": image.onnxruntime or profile.runtime.onnxruntime,
        "musplit_sha256": own_digest(),
    }  # fmt: skip
    if there and _made_for(folder) == made_for:
        with contextlib.suppress(WheelhouseError):  # damaged: built again
            return check_wheelhouse(folder)
    with tempfile.TemporaryDirectory(prefix="musplit-wheels-") as name:
        scratch = Path(name)
        pins = _pins(own_wheel(scratch), made_for["onnxruntime"])
        _download(profile, image, pins, scratch)
        _describe(scratch, made_for)
        _replace(scratch, folder)
    return check_wheelhouse(folder)


def check_wheelhouse(folder: Path) -> Wheelhouse:
    """The wheelhouse in a folder, every hash compared. Raises WheelhouseError."""
    remedy = f"build it again: musplit wheelhouse --out {folder}"
    try:
        sums = dict(_parse_sums((folder / SUMS).read_text(encoding="utf-8")))
        python, machine = (
            (folder / name).read_text(encoding="utf-8").strip() for name in ("python", "machine")
        )
        found = {path.name for path in folder.iterdir()} - {SUMS}
    except (OSError, ValueError) as error:
        raise WheelhouseError(f"{folder}: no wheelhouse ({error}); {remedy}") from error
    if found != set(sums):
        odd = min(found ^ set(sums))
        raise WheelhouseError(f"{folder}: {odd} is missing, or too many; {remedy}")
    for name, digest in sums.items():
        if _sha256(folder / name) != digest:
            raise WheelhouseError(f"{folder}: {name} is damaged; {remedy}")
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    wheels = sum(name.endswith(".whl") for name in found)
    return Wheelhouse(folder, wheels, size_bytes, python, machine)


def check_fits(wheelhouse: Wheelhouse, profile: Profile, image: Image) -> None:
    """Raises WheelhouseError when the wheels are for another system."""
    wanted = (board_python(image), profile.cpu.architecture)
    if (wheelhouse.python, wheelhouse.machine) != wanted:
        raise WheelhouseError(
            f"{wheelhouse.folder}: for Python {wheelhouse.python} on {wheelhouse.machine}; "
            f"{image.release} has {wanted[0]} on {wanted[1]}: musplit wheelhouse --profile "
            f"{profile.name} --system {image.name}"
        )


def board_python(image: Image) -> str:
    """The Python that the device program runs on: the image's own, or the oldest that will do."""
    return image.python if image.python in _PYTHONS else _PYTHONS[0]


def _pins(own: Path, onnxruntime: str) -> dict[str, str]:
    """Name -> version of everything musplit needs: as installed here, but for onnxruntime."""
    pins: dict[str, str] = {"pip": _installed("pip")}
    waiting = _requirements(_metadata(own))
    while waiting:
        name, marked = waiting.pop()
        if name in pins or name in _LEFT_OUT:
            continue
        try:
            waiting += _requirements(distribution(name).requires or [])
        except PackageNotFoundError:
            if marked:
                continue  # of another system, or an older Python
        pins[name] = _installed(name)
    pins["onnxruntime"] = onnxruntime
    return dict(sorted(pins.items()))


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise WheelhouseError(
            f"{name} is not installed here; python -m pip install {name}"
        ) from error


def _metadata(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    return HeaderParser().parsestr(text).get_all("Requires-Dist") or []


def _requirements(lines: list[str]) -> list[tuple[str, bool]]:
    """Requirements that no extra asks for: the name in normal form; whether under conditions."""
    names = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        found = _NAME.match(requirement.strip())
        if found is not None and "extra" not in marker:
            names.append((re.sub(r"[-_.]+", "-", found[0]).lower(), bool(marker)))
    return names


def _download(profile: Profile, image: Image, pins: dict[str, str], folder: Path) -> None:
    newest = int(image.glibc.partition(".")[2])
    machine = profile.cpu.architecture
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, _OLDEST_GLIBC - 1, -1)]
    platforms.append(f"manylinux2014_{machine}")
    run_pip(
        "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--implementation", "cp",
        "--python-version", board_python(image), "--dest", str(folder),
        *(part for platform in platforms for part in ("--platform", platform)),
        *(f"{name}=={number}" for name, number in pins.items()),
    )  # fmt: skip


def _describe(folder: Path, made_for: Mapping[str, str]) -> None:
    wheels = sorted(folder.glob("*.whl"))
    lines = []
    for wheel in wheels:
        name, number = wheel.name.split("-")[:2]
        if name != "pip":
            lines.append(f"{name.replace('_', '-')}=={number} --hash=sha256:{_sha256(wheel)}")
    (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "python").write_text(f"{made_for['python']}\n", encoding="utf-8")
    (folder / "machine").write_text(f"{made_for['machine']}\n", encoding="utf-8")
    (folder / _MADE_FOR).write_text(json.dumps(made_for, indent=2) + "\n", encoding="utf-8")
    sums = [f"{_sha256(path)}  {path.name}" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("\n".join(sums) + "\n", encoding="utf-8")


def _replace(scratch: Path, folder: Path) -> None:
    """Put the new wheelhouse in place of an older one: whole, or not at all."""
    fresh = folder.resolve().with_name(f"{folder.resolve().name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for path in scratch.iterdir():
        shutil.move(path, fresh / path.name)
    if folder.is_dir():
        shutil.rmtree(folder)
    fresh.rename(folder.resolve())


def _made_for(folder: Path) -> object:
    try:
        return json.loads((folder / _MADE_FOR).read_bytes())
    except (OSError, ValueError):
        return None


def _parse_sums(text: str) -> list[tuple[str, str]]:
    pairs = [line.split("  ", 1) for line in text.splitlines()]
    return [(name, digest) for digest, name in pairs]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
