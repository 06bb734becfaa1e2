"""Profiles by name, those that ship with musplit, or by path, a user's own."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec

from firmware_profiles.errors import ProfileError
from firmware_profiles.schema import Profile

_SUFFIX: Final = ".toml"
_MAX_BYTES: Final = 1 << 20


def load_profile(name_or_path: str) -> Profile:
    """The profile of that name ("rpi-4b", "rpi-4b:4096" for one memory size), or of that file.

    A path ends in .toml, and takes a size likewise. Raises ProfileError.
    """
    base, colon, size = name_or_path.partition(":")
    if base.endswith(_SUFFIX):
        profile = read_profile(Path(base))
    else:
        known = {profile.name: profile for profile in catalogue()}
        if base not in known:
            raise ProfileError(
                f"profile {name_or_path!r}: unknown; write one of {', '.join(known)}, or the path "
                f"of a {_SUFFIX} file"
            )
        profile = known[base]
    if not colon:
        return profile
    if not size.isdecimal() or int(size) not in profile.memory_mb:
        sizes = ", ".join(map(str, profile.memory_mb))
        raise ProfileError(f"profile {name_or_path!r}: {base} is sold with {sizes} MB; write one")
    return msgspec.structs.replace(profile, memory_mb=[int(size)])


def read_profile(path: Path) -> Profile:
    """A user's own file. Raises ProfileError, one line that names file, field and remedy."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ProfileError(f"{path}: is no file; give a profile's TOML file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not a text file in UTF-8") from error
    if len(data) > _MAX_BYTES:
        raise ProfileError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so no profile")
    return parse_profile(text, str(path))


def parse_profile(text: str, where: str) -> Profile:
    """A profile's TOML; `where` is what errors name. Raises ProfileError."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers too long and nests too deep, too
        raise ProfileError(f"{where}: not TOML: {error}") from error
    try:
        profile = msgspec.convert(tree, Profile)
    except msgspec.ValidationError as error:
        what, _, field = str(error).partition(" - at `$")
        field = field.strip("`.") or "the file"
        raise ProfileError(f"{where}: {field}: {what}; see docs/profiles.md") from error
    for field, problem in _problems(profile):
        raise ProfileError(f"{where}: {field}: {problem}")
    return profile


@cache
def catalogue() -> list[Profile]:
    """Every profile that ships with musplit, by name."""
    boards = files("firmware_profiles").joinpath("boards")
    entries = [entry for entry in boards.iterdir() if entry.name.endswith(_SUFFIX)]
    return sorted(
        (parse_profile(entry.read_text(encoding="utf-8"), entry.name) for entry in entries),
        key=lambda profile: profile.name,
    )


def as_builtins(profile: Profile) -> dict[str, Any]:
    """The profile as TOML and JSON have it; fields without a value are left out."""
    found: dict[str, Any] = _without_none(msgspec.to_builtins(profile))
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _problems(profile: Profile) -> Iterator[tuple[str, str]]:
    """What contradicts itself: the field, and what to do."""
    idle, load, runtime = profile.power.idle, profile.power.load, profile.runtime
    if load.value_w < idle.value_w:
        yield (
            "power.load.value_w",
            f"{load.value_w} W is below power.idle.value_w, {idle.value_w} W; measure again",
        )
    if load.boundary != idle.boundary:
        yield (
            "power.load.boundary",
            f"{load.boundary}, but power.idle has {idle.boundary}; measure both at one place",
        )
    if runtime.onnxruntime in {crash.version for crash in runtime.crashes}:
        yield (
            "runtime.onnxruntime",
            f"{runtime.onnxruntime} is among runtime.crashes; pin another version",
        )
    sensors = profile.power.sensors
    if len(set(sensors)) < len(sensors):
        yield "power.sensors", "names a meter twice; write each once"
    if "model" in sensors[:-1]:
        yield "power.sensors", "what stands behind model is never read; write model last"
    if len(set(profile.memory_mb)) < len(profile.memory_mb):
        yield "memory_mb", "lists a size twice; write each once"
