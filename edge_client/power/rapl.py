"""RAPL of x86 processors: energy counters of packages and their memory, in microjoules.

A package counts its cores and graphics already, and `intel-rapl-mmio` shows the same package a
second time: neither is added. The counters wrap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from edge_client.errors import MeterError
from edge_client.power.meter import Reading
from edge_client.power.sysfs import read_line, read_number
from wire_protocol.energy import Origin


class Domain(NamedTuple):
    """A counter, and the microjoules after which it begins at 0 again."""

    name: str
    path: Path
    range_uj: float


class RaplMeter:
    """The mean power since the reading before, by the counters: no energy is missed between."""

    def __init__(
        self, root: Path, *, rate_hz: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises MeterError when there is no counter, or root alone may read it."""
        self._now_s = now_s
        self._domains = list(rapl_domains(root))
        if not self._domains:
            raise MeterError("rapl: no package below /sys/class/powercap")
        self._last_s, self._last_uj = self._counters()
        self.origin = Origin(
            meter="rapl",
            driver=f"rapl: {' + '.join(domain.name for domain in self._domains)}"[:200],
            boundary="soc-rails",
            reading="mean",
            rate_hz=rate_hz,
            resolution_w=None,
            uncertainty_relative=0.05,
            uncertainty_source="assumed: a model inside the processor on some generations",
        )

    def read(self) -> Reading:
        """The mean power since the last call. Raises MeterError."""
        now_s, counters = self._counters()
        spent_uj = 0.0
        for domain, before, after in zip(self._domains, self._last_uj, counters, strict=True):
            spent_uj += after - before + (domain.range_uj if after < before else 0.0)
        seconds = now_s - self._last_s
        if spent_uj <= 0:  # the next reading is the mean since the last that counted
            raise MeterError("rapl: the counters stand still")
        self._last_s, self._last_uj = now_s, counters
        return Reading(now_s, spent_uj * 1e-6 / seconds)

    def close(self) -> None:
        """Nothing is held open."""

    def _counters(self) -> tuple[float, list[float]]:
        begin_s = self._now_s()
        counters = [read_number(domain.path) for domain in self._domains]
        return (begin_s + self._now_s()) / 2, counters


def rapl_domains(root: Path) -> Iterator[Domain]:
    """The packages, and their memory beside them."""
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        name = read_line(folder / "name")
        if name.startswith("package") or name == "dram":
            yield Domain(name, folder / "energy_uj", read_number(folder / "max_energy_range_uj"))
