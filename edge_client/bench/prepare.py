"""Before the first window: the board's profile, the meter, and a new or a resumed folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from edge_client.bench.environment import Environment, read_environment
from edge_client.bench.evidence import Evidence
from edge_client.bench.gpio import open_edge
from edge_client.bench.records import FORMAT, Configuration, ModelPower
from edge_client.bench.runner import describe
from edge_client.bundle import read_bundle
from edge_client.errors import EvidenceError
from edge_client.power.choose import profile_here
from edge_client.power.find import MeterOptions, find_meter
from edge_client.power.meter import Meter
from edge_client.power.model import board_model
from edge_client.power.sampler import RATE_HZ
from firmware_profiles.schema import Profile
from wire_protocol.encodings import Encoding
from wire_protocol.energy import NoEnergy
from wire_protocol.errors import UnmeasuredError

# What the experiments use; latency does not depend on it.
_LAM: Final = 1e-3
_NO_ENERGY: Final = "none"  # of --meter: not even a model


class Asked(NamedTuple):
    """What a bench is asked for, beside bundles and meter; fields as of records.Configuration."""

    batch: int
    directions: int
    encoding: Encoding
    threads: int | None  # None: the profile's
    window_s: float
    repeats: int
    rate_hz: float | None  # None: what suits the meter
    meter: str
    gpio: str


def choose_meter(
    asked: Asked, profile: Profile | None, mode: str | None, *, required: bool
) -> Meter | NoEnergy:
    """The meter, or why there is none. Raises UnmeasuredError, MeterError."""
    if mode == "performance":
        found: Meter | NoEnergy = NoEnergy("performance mode: power is not sampled")
    else:
        found = find_meter(MeterOptions(asked.meter, asked.rate_hz), profile)
    if isinstance(found, NoEnergy) and (required or mode == "energy"):
        raise UnmeasuredError(f"measured energy is required: {found.reason}")
    return found


def begin(
    folder: Path, bundles: Sequence[Path], meter: Meter | NoEnergy, profile: Profile | None,
    asked: Asked,
) -> Evidence:  # fmt: skip
    """A new folder of evidence. Raises EvidenceError, BundleError, GpioError."""
    open_edge(asked.gpio).close()  # better now than after a model was exported and loaded
    fields = asked._asdict()
    threads = asked.threads or (profile.runtime.threads if profile else 1)
    rate_hz = RATE_HZ if isinstance(meter, NoEnergy) else meter.origin.rate_hz
    fields |= {"threads": threads, "rate_hz": asked.rate_hz or rate_hz}
    configuration = Configuration(
        format=FORMAT, mode="performance" if isinstance(meter, NoEnergy) else "energy", lam=_LAM,
        profile=profile.name if profile else "",
        model_power=_model_power(profile, asked.meter, threads),
        cuts=[describe(read_bundle(bundle)) for bundle in bundles], **fields,
    )  # fmt: skip
    return Evidence.create(folder, configuration, _environment(meter))


def go_on(folder: Path) -> tuple[Evidence, Meter | NoEnergy]:
    """A folder that lacks windows, and the meter it was begun with. Raises EvidenceError."""
    evidence = Evidence.open(folder)
    asked, first = evidence.configuration, evidence.environments[0]
    meter: Meter | NoEnergy = NoEnergy(first.meter_reason or "performance mode")
    if not evidence.missing():
        return evidence, meter
    if asked.mode == "energy":
        meter = find_meter(MeterOptions(asked.meter, asked.rate_hz), profile_here(Path("/")))
        if isinstance(meter, NoEnergy):
            raise EvidenceError(f"{folder}: was begun with a meter, and now: {meter.reason}")
    evidence.add_environment(_environment(meter))
    return evidence, meter


def _environment(meter: Meter | NoEnergy) -> Environment:
    if isinstance(meter, NoEnergy):
        return read_environment(None, meter.reason)
    return read_environment(meter.origin, None)


def _model_power(profile: Profile | None, meter: str, threads: int) -> ModelPower | None:
    if profile is None or meter == _NO_ENERGY:
        return None
    return ModelPower(*board_model(profile.name, profile.power, profile.cpu.cores, threads))
