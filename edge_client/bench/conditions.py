"""Temperature, clock frequency and throttling of the machine, as its kernel tells them.

Every reader takes `root`, so that a recorded tree stands for a board. What is not there is None.

throttle  a word of what the machine's source says:
  vcgencmd:0x50000  Raspberry Pi firmware; bits 0-3 hold now, 16-19 since boot
  counter:12        events counted by the kernel: Intel's thermal_throttle, Jetson's over-current
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from edge_client.firmware import throttled_bits

_ROOT: Final = Path("/")
_COUNTERS: Final = (
    "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
    "sys/class/hwmon/hwmon*/oc*_event_cnt",
)
_PI_FLAGS: Final = 0xF000F


class Conditions(NamedTuple):
    """The state of the machine at one moment."""

    temperature_c: float | None  # of its hottest zone
    frequency_hz: float | None  # mean of the cores
    throttle: str | None


def busy_s() -> float:
    """Processor time of all programs on all cores since boot, time stolen from them included."""
    times = psutil.cpu_times()
    stolen = getattr(times, "steal", 0.0) + getattr(times, "irq", 0.0)
    return float(times.user + times.system + stolen + getattr(times, "softirq", 0.0))


def read_conditions(root: Path = _ROOT) -> Conditions:
    """Now."""
    zones = list(_numbers(root, "sys/class/thermal/thermal_zone*/temp"))
    return Conditions(max(zones) / 1000 if zones else None, _frequency_hz(root), _throttle(root))


def throttled(before: str | None, after: str | None) -> bool | None:
    """Whether a window was throttled, by its two words; None: the machine does not tell.

    Raises ValueError when they are no such words.
    """
    if before is None or after is None:
        return None
    kind, _, first = before.partition(":")
    same, _, second = after.partition(":")
    if kind != same or kind not in {"vcgencmd", "counter"}:
        raise ValueError(f"{before!r} and {after!r} are no throttle words")
    if kind == "vcgencmd":
        return bool((int(first, 16) | int(second, 16)) & _PI_FLAGS)
    return int(second) > int(first)


def _frequency_hz(root: Path) -> float | None:
    cores = [
        khz * 1e3 for khz in _numbers(root, "sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
    ]
    if not cores:  # x86 in a virtual machine
        try:
            text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if line.startswith("cpu MHz")]
            cores = [float(line.partition(":")[2]) * 1e6 for line in lines]
        except (OSError, ValueError):
            return None
    return sum(cores) / len(cores) if cores else None


def _throttle(root: Path) -> str | None:
    word = throttled_bits(root)
    if word is not None:
        return f"vcgencmd:{word:#x}"
    counts = [count for pattern in _COUNTERS for count in _numbers(root, pattern)]
    return f"counter:{int(sum(counts))}" if counts else None


def _numbers(root: Path, pattern: str) -> Iterator[float]:
    for path in sorted(root.glob(pattern)):
        try:
            yield float(path.read_text(encoding="ascii"))
        except (OSError, ValueError):  # a zone that is switched off
            continue
