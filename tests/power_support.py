"""Boards of paper: trees of sysfs files that follow a load of known energy, on a clock by hand."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_client.power.meter import Meter
from edge_client.power.sampler import Clock, Sampler
from wire_protocol.energy import Origin

LOW_W, HIGH_W = 2.0, 6.0


class Load(NamedTuple):
    """Watts at a time, and joules from 0 until then."""

    power_w: Callable[[float], float]
    energy_j: Callable[[float], float]


def constant(watts: float = 4.2) -> Load:
    return Load(lambda _: watts, lambda t: watts * t)


def step(at_s: float = 5.27) -> Load:
    return Load(
        lambda t: LOW_W if t < at_s else HIGH_W,
        lambda t: LOW_W * t + (HIGH_W - LOW_W) * max(0.0, t - at_s),
    )


def square(phase: float = 0.0, hz: float = 1.0) -> Load:
    """Half of the time at either power."""

    def turns(t: float) -> float:
        return t * hz + phase

    def high_s(t: float) -> float:
        whole = math.floor(turns(t))
        return (whole / 2 + min(turns(t) - whole, 0.5)) / hz

    return Load(
        lambda t: HIGH_W if turns(t) % 1.0 < 0.5 else LOW_W,
        lambda t: LOW_W * t + (HIGH_W - LOW_W) * (high_s(t) - high_s(0.0)),
    )


LOADS = {
    "constant": constant(),
    "step": step(),
    "square": square(),
    "square, in phase with readings": square(0.1),
    "square, out of phase": square(0.37),
}


class Bench:
    """A clock that the sampler turns, and what happens at its times."""

    def __init__(self, seconds: float, follow: Callable[[float], None], jitter_s: float = 3e-4):
        self.t_s = 0.0
        self._seconds, self._follow, self._jitter_s = seconds, follow, jitter_s
        self._random = random.Random(7)
        follow(0.0)

    def now_s(self) -> float:
        return self.t_s

    def wait(self, seconds: float) -> bool:
        """Sleepers wake late, and differently so."""
        self.t_s += seconds + self._random.random() * self._jitter_s
        self._follow(self.t_s)
        return self.t_s > self._seconds

    def sample(self, meter: Meter, rate_hz: float = 10.0):
        return Sampler(meter, rate_hz).run(Clock(self.now_s, self.wait))


def put(path: Path, value: object) -> None:
    try:
        path.write_text(f"{value}\n")
    except FileNotFoundError:
        path.parent.mkdir(parents=True)
        path.write_text(f"{value}\n")


def put_hwmon(root: Path, number: int, name: str, device: str, **files: object) -> Path:
    """A hwmon folder where the kernel puts it: below its device, with a link in class/hwmon."""
    behind = root / "sys/devices" / device
    folder = behind / f"hwmon/hwmon{number}"
    link = root / f"sys/class/hwmon/hwmon{number}"
    if not link.exists():
        put(folder / "name", name)
        (folder / "device").symlink_to(behind)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    for file, value in files.items():
        (folder / file).write_text(f"{value}\n")
    return folder


def drop_hwmon(root: Path) -> None:
    """All sensors are gone."""
    shutil.rmtree(root / "sys/class/hwmon", ignore_errors=True)
    shutil.rmtree(root / "sys/devices", ignore_errors=True)


def origin(reading: str = "instant", **changes: object) -> Origin:
    fields = {
        "meter": "test", "driver": "by hand", "boundary": "board-dc", "reading": reading,
        "rate_hz": 10.0, "resolution_w": None, "uncertainty_relative": 0.01,
        "uncertainty_source": "by hand",
    }  # fmt: skip
    return Origin(**(fields | changes))
