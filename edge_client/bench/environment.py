"""On what was measured: the machine, the versions, the meter. No host name, no address."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil

from edge_client.bench.records import Record
from wire_protocol.energy import Origin

_MODEL: Final = "proc/device-tree/model"
_GOVERNOR: Final = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
_PACKAGES: Final = ("musplit", "numpy", "onnxruntime", "msgspec", "psutil")


class Environment(Record, frozen=True):
    """environment.json: one session of a bench."""

    started: str  # UTC, to the second
    board: str | None  # as the device tree calls it; None: the machine has none
    machine: str  # e.g. aarch64
    processor: str
    cores: int
    memory_bytes: int
    kernel: str
    system: str | None  # PRETTY_NAME of os-release
    governor: str | None  # of the clock frequency; None: the kernel does not tell
    versions: dict[str, str]
    meter: Origin | None
    meter_reason: str | None  # why there is no meter


def read_environment(
    meter: Origin | None, meter_reason: str | None, root: Path = Path("/")
) -> Environment:
    """The machine that runs this, now."""
    return Environment(
        started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        board=_text(root / _MODEL),
        machine=platform.machine(),
        processor=_processor(root),
        cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        system=_system(root),
        governor=_text(root / _GOVERNOR),
        versions={"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
        meter=meter,
        meter_reason=meter_reason,
    )


def _text(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.strip("\0 \n") or None


def _processor(root: Path) -> str:
    text = _text(root / "proc/cpuinfo") or ""
    for key in ("model name", "Model", "Hardware"):
        for line in text.splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == key:
                return value.strip()
    return platform.processor() or platform.machine()


def _system(root: Path) -> str | None:
    for line in (_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return None
