"""The wiring check behind `musplit power`: what is here, and what it reads for some seconds."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_client.errors import GapError
from edge_client.power.find import Finding, MeterOptions, find_meter, survey
from edge_client.power.integrate import Trace, integrate
from edge_client.power.meter import Meter
from edge_client.power.model import board_model
from edge_client.power.recorded import read_recorded
from edge_client.power.sampler import Sampler
from edge_client.power.spec import split_options
from firmware_profiles.schema import Profile
from wire_protocol.energy import Energy, EnergyMeasured, NoEnergy


class Checked(NamedTuple):
    """What a check came to."""

    meters: list[Finding]
    energy: Energy
    reason: str  # why it is not measured; empty when it is
    trace: Trace | None
    sampler_core: float | None  # processor time of the sampler, as a part of a core

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "meters": [finding._asdict() for finding in self.meters],
            "energy": msgspec.to_builtins(self.energy),
            "reason": self.reason or None,
            "sampler_core": self.sampler_core,
        }


def check_power(
    options: MeterOptions, profile: Profile | None, *, named: bool, seconds: float,
    root: Path = Path("/"),
) -> Checked:  # fmt: skip
    """Read the meter for so long. Raises MeterError when it was named and cannot be read.

    `named`: the profile was, so that its order of meters counts. Without a meter, the energy is the
    model's for an idle board.
    """
    ordered = profile if named else None
    meters = list(survey(ordered, root))
    found = find_meter(options, ordered, root)
    if not isinstance(found, NoEnergy):
        trace, core = _sample(found, seconds)
        energy: Energy = measure(trace, seconds)
        reason = energy.reason if isinstance(energy, NoEnergy) else ""
        return Checked(meters, energy, reason, trace, core)
    if profile is None or options.spec == "none":
        return Checked(meters, found, found.reason, None, None)
    threads = profile.cpu.cores
    model = board_model(profile.name, profile.power, profile.cpu.cores, threads)
    return Checked(meters, model.energy(0.0, seconds), found.reason, None, None)


def read_file(spec: str) -> Checked:
    """A recorded file, FILE or FILE?KEY=VALUE&..; its whole length. Raises MeterError."""
    path, options = split_options(spec, "recorded")
    trace = read_recorded(Path(path), options)
    begin_s, end_s = float(trace.times_s[0]), float(trace.times_s[-1])
    energy = measure(trace, end_s - begin_s)
    reason = energy.reason if isinstance(energy, NoEnergy) else ""
    return Checked([], energy, reason, trace, None)


def measure(trace: Trace, seconds: float) -> EnergyMeasured | NoEnergy:
    """The first `seconds` of a trace, or why they have no energy."""
    begin_s = float(trace.times_s[0]) if len(trace.times_s) else 0.0
    try:
        return integrate(trace, begin_s, begin_s + seconds)
    except GapError as error:
        return NoEnergy(str(error)[:400])


def processor_s() -> float:
    """Processor time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _sample(meter: Meter, seconds: float) -> tuple[Trace, float]:
    """The trace, and what reading it took of a core: nothing else runs meanwhile."""
    # A little more: the window begins at the first reading, which is not at once.
    whole_s = seconds + 1.5 / meter.origin.rate_hz
    begin_s = processor_s()
    with Sampler(meter, meter.origin.rate_hz) as sampler:
        time.sleep(whole_s)
    core = (processor_s() - begin_s) / whole_s
    meter.close()
    return sampler.trace(), core
