"""The system: 64 bits, Python, C library, the processor's instructions."""

from __future__ import annotations

import os
import platform
import struct
import sys
from typing import Final, NamedTuple

from edge_client.doctor.findings import Board, Findings, error, ok, warning

_PYTHONS: Final = ((3, 11), (3, 13))  # pyproject.toml, requires-python
_GLIBC: Final = (2, 28)  # the manylinux tag of onnxruntime's wheels
# Without a profile: what numpy's and onnxruntime's wheels assume.
_LEAST: Final = {"aarch64": ("fp", "asimd"), "x86_64": ("ssse3", "sse4_1", "sse4_2", "popcnt")}
# In the list, but services of the kernel, no instructions.
_NO_INSTRUCTIONS: Final = frozenset({"evtstrm", "cpuid"})
# onnxruntime 1.24.1 aborts at import where these are missing, as in some sandboxes.
_CPU_LISTS: Final = ("sys/devices/system/cpu/possible", "sys/devices/system/cpu/present")


class System(NamedTuple):
    """What Python tells of the system it runs on."""

    machine: str
    pointer_bits: int
    python: tuple[int, int]
    glibc: str  # "2.36"; empty: another C library


def this_system() -> System:
    """The system of this process."""
    try:
        name, _, glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, AttributeError, OSError):
        name = glibc = ""
    bits = 8 * struct.calcsize("P")
    found = glibc if name == "glibc" else ""
    return System(platform.machine(), bits, sys.version_info[:2], found)


def check_system(board: Board, system: System) -> Findings:
    """64 bits, Python, glibc, instructions, the lists of processors."""
    yield from _bits(board, system)
    yield from _python(system)
    yield from _glibc(system)
    yield from _features(board, system)
    missing = [f"/{path}" for path in _CPU_LISTS if board.read(path) is None]
    if missing:
        yield warning(
            "cpu-lists", f"{' and '.join(missing)} cannot be read",
            "onnxruntime counts processors there, and some versions abort at import without",
            "let the service or container see /sys/devices/system/cpu (no ProcSubset=pid, "
            "no ProtectKernelTunables)",
        )  # fmt: skip


def _bits(board: Board, system: System) -> Findings:
    told = f"{system.pointer_bits}-bit Python on {system.machine}"
    expected = board.profile.cpu.architecture if board.profile else None
    if system.pointer_bits != 64 or system.machine not in _LEAST:
        yield error(
            "architecture", told,
            "onnxruntime, numpy and psutil have no wheels for 32-bit ARM or other processors",
            "flash a 64-bit image (musplit flash names those of each board), even where the kernel "
            "is 64-bit already",
        )  # fmt: skip
    elif expected not in (None, system.machine):
        yield error(
            "architecture", told, f"the profile is of a board with {expected}",
            "give the profile of this board: musplit profiles list",
        )  # fmt: skip
    else:
        yield ok("architecture", told)


def _python(system: System) -> Findings:
    told = ".".join(map(str, system.python))
    if _PYTHONS[0] <= system.python <= _PYTHONS[1]:
        yield ok("python", told)
        return
    least, most = (".".join(map(str, version)) for version in _PYTHONS)
    yield error(
        "python", told, f"musplit and its wheels are for Python {least} to {most}",
        "install another Python or image: musplit profiles show PROFILE tells how",
    )  # fmt: skip


def _glibc(system: System) -> Findings:
    least = ".".join(map(str, _GLIBC))
    if not system.glibc:
        yield error(
            "glibc", "another C library", "the wheels of onnxruntime need glibc",
            "use an image with glibc: Raspberry Pi OS, Debian, Ubuntu, JetPack",
        )  # fmt: skip
    elif tuple(map(int, system.glibc.split(".")[:2])) < _GLIBC:
        yield error(
            "glibc", system.glibc, f"the wheels of onnxruntime need {least} or later",
            "flash a newer image: musplit profiles show PROFILE lists them",
        )  # fmt: skip
    else:
        yield ok("glibc", system.glibc)


def _features(board: Board, system: System) -> Findings:
    text = board.read("proc/cpuinfo") or ""
    pairs = (line.partition(":") for line in text.splitlines())
    listed = [value.split() for key, _, value in pairs if key.strip() in ("Features", "flags")]
    if not listed:
        yield warning(
            "cpu-features", "/proc/cpuinfo lists none",
            "what the processor lacks cannot be told beforehand",
            "the check of onnxruntime below tells whether its wheel runs",
        )  # fmt: skip
        return
    profile = board.profile
    if profile is not None and profile.cpu.architecture != system.machine:
        profile = None  # said already; its list is another processor's
    wanted = profile.cpu.features if profile else _LEAST.get(system.machine, ())
    # Cores may differ: what one of them lacks is lacking.
    has = set.intersection(*map(set, listed))
    missing = [name for name in wanted if name not in has | _NO_INSTRUCTIONS]
    if missing:
        of = f"boards of profile {profile.name} have" if profile else "the wheels need"
        yield error(
            "cpu-features", f"the processor lacks {', '.join(missing)}",
            f"{of} them; a wheel that uses them dies of an illegal instruction",
            "give the profile of this board, or in a virtual machine pass the host's processor",
        )  # fmt: skip
    else:
        yield ok("cpu-features", f"all of {', '.join(wanted)}")
