"""Room on the disk and in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from edge_client.doctor.findings import Board, Finding, Findings, error, ok, warning
from firmware_profiles.schema import Profile

_MB: Final = 10**6
_DISK_LEAST_MB: Final = 50
_DISK_ENOUGH_MB: Final = 300
# The idle device program takes up to 90 MB, and a small model with its batch some more.
_MEMORY_LEAST_MB: Final = 100
_MEMORY_ENOUGH_MB: Final = 200
# The kernel and the graphics processor keep some of what is sold.
_VISIBLE: Final = 0.75


def check_disk(state: Path) -> Findings:
    """The file system that the state folder is on, or will be."""
    folder = next(path for path in (state.absolute(), *state.absolute().parents) if path.is_dir())
    figures = os.statvfs(folder)
    if figures.f_flag & os.ST_RDONLY:
        yield error(
            "disk", f"{folder} is mounted read-only", "weights could not be kept over a restart",
            "a damaged card is mounted so: check it (dmesg), replace it, or give --state elsewhere",
        )  # fmt: skip
        return
    free_mb = figures.f_bavail * figures.f_frsize // _MB
    told, why = f"{free_mb} MB free in {folder}", "weights, bundles and logs need room"
    remedy = "free some (journalctl --vacuum-size=50M, apt-get clean), or take a larger card"
    yield _room("disk", free_mb, (_DISK_LEAST_MB, _DISK_ENOUGH_MB), told, why, remedy)


def check_memory(board: Board) -> Findings:
    """What is there against the profile, and what is free against the device program."""
    text = board.read("proc/meminfo") or ""
    lines = (line.partition(":") for line in text.splitlines())
    fields = {key: int(value.split()[0]) * 1024 // _MB for key, _, value in lines if value.strip()}
    total_mb, free_mb = fields.get("MemTotal"), fields.get("MemAvailable")
    if total_mb is None or free_mb is None:
        yield warning(
            "memory", "/proc/meminfo tells nothing", "whether the model fits cannot be told",
            "mount /proc",
        )  # fmt: skip
        return
    if board.profile is not None and board.profile.kind != "laptop":  # those have any size
        yield from _against_profile(board.profile, total_mb)
    told, why = f"{free_mb} of {total_mb} MB available", "the idle device program takes 90 MB"
    remedy = "stop other programs (a desktop above all), or cut the model earlier: musplit plan"
    yield _room("memory", free_mb, (_MEMORY_LEAST_MB, _MEMORY_ENOUGH_MB), told, why, remedy)


def _room(
    check: str, free_mb: int, limits_mb: tuple[int, int], told: str, why: str, remedy: str
) -> Finding:
    """An error below the first limit, a warning below the second."""
    least_mb, enough_mb = limits_mb
    if free_mb < least_mb:
        return error(check, told, why, remedy)
    if free_mb < enough_mb:
        return warning(check, told, why, remedy)
    return ok(check, told)


def _against_profile(profile: Profile, total_mb: int) -> Findings:
    sizes, name = sorted(profile.memory_mb), profile.name
    # Sizes are sold in MiB.
    sold = [size for size in sizes if total_mb <= size * 1.048576]
    if sold and total_mb >= _VISIBLE * sold[0] * 1.048576:
        yield ok("memory-profile", f"{total_mb} MB: a {name} with {sold[0]} MB")
        return
    yield warning(
        "memory-profile", f"{total_mb} MB, but {name} has {' or '.join(map(str, sizes))} MB",
        "plans and emulation by this profile are of another board",
        "give the profile of this board: musplit profiles list",
    )  # fmt: skip
