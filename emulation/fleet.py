"""The fleet file of `musplit emulate --fleet`: which boards, how many, on which links.

docs/profiles.md explains every field. What a field leaves out is the profile's.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta, field

from edge_client.stand_in import Delay, StandIn
from emulation.errors import FleetFileError
from emulation.link import LinkShape
from firmware_profiles.catalogue import load_profile
from firmware_profiles.errors import ProfileError
from firmware_profiles.schema import Profile

# What an emulation was begun with; it goes on with the same when it is resumed.
FLEET_FILE: Final = "fleet.json"

Rate = Annotated[float, Meta(gt=0, le=1e15)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=0.5)]
SlowMotion = Annotated[float, Meta(ge=1, le=1e6)]


class DeviceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many devices of one board."""

    profile: str  # a name, or a path from the fleet file's folder
    count: Annotated[int, Meta(ge=1, le=10_000)] = 1
    up_bits_s: Rate | None = None
    down_bits_s: Rate | None = None
    latency_s: Seconds | None = None  # one way
    loss: Share = 0.0  # of the TCP segments
    # Waited before each round's first forward, in the mean.
    delay_s: Seconds = 0.0
    delay: Literal["constant", "exponential", "uniform"] = "constant"
    spread: Annotated[float, Meta(ge=0, le=1)] = 0.5  # uniform: delay_s times 1 - spread .. 1 + it


class FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fleet file."""

    device: Annotated[list[DeviceEntry], Meta(min_length=1)]
    host: str = "laptop"  # the profile of the machine that emulates
    # All takes so many times as long: for boards that this machine is too slow, or too small, for.
    slow_motion: SlowMotion | Literal["auto"] = "auto"


class EmulatedDevice(msgspec.Struct, frozen=True):
    """One device of the fleet, with everything that is known of its board."""

    profile: Profile
    link: LinkShape
    ratio: float  # time of a step on the board / on this machine
    host_threads: int
    delay: Delay = field(default_factory=Delay)
    slow_motion: float = 1.0  # here all takes so many times as long; in nothing above

    @property
    def threads(self) -> int:
        """The board's, as far as this machine has cores: more would only get in each other's way.

        The step takes as long as on the board in either case.
        """
        return min(self.profile.runtime.threads, os.cpu_count() or 1)

    @property
    def link_here(self) -> LinkShape:
        """The link in slow motion."""
        link, factor = self.link, self.slow_motion
        return LinkShape(
            link.up_bits_s / factor, link.down_bits_s / factor, link.latency_s * factor, link.loss
        )

    def stand_in(self, turns: Path) -> StandIn:
        """What the device program is told."""
        profile = self.profile
        return StandIn(
            profile.name, self.ratio, profile.runtime.threads, self.host_threads, str(turns),
            profile.speed.calibrated, self.delay, profile.power, profile.cpu.cores,
            self.slow_motion,
        )  # fmt: skip


class Fleet(NamedTuple):
    """What a fleet file says."""

    devices: list[EmulatedDevice]  # 0, 1, ..; not yet in slow motion
    slow_motion: float | None  # None: as slow as this machine needs


def load_fleet(path: Path) -> Fleet:
    """Read a fleet file. Raises FleetFileError and ProfileError."""
    try:
        fleet = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), FleetFile)
    except OSError as error:
        raise FleetFileError(f"{path}: cannot be read ({error.strerror})") from error
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        name = where.strip("`.") or "the file"
        raise FleetFileError(f"{path}: {name}: {what}; see docs/profiles.md") from error
    except (ValueError, RecursionError) as error:  # numbers too long, nests too deep
        raise FleetFileError(f"{path}: not TOML: {error}") from error
    host = _profile(path, "host", fleet.host)
    slow_motion = None if fleet.slow_motion == "auto" else fleet.slow_motion
    devices: list[EmulatedDevice] = []
    for number, entry in enumerate(fleet.device):
        where = f"device[{number}].profile"
        devices += [_device(path, where, entry, host, slow_motion)] * entry.count
    return Fleet(devices, slow_motion)


def save_fleet(devices: list[EmulatedDevice], folder: Path) -> None:
    """Keep the fleet in the run folder."""
    (folder / FLEET_FILE).write_bytes(msgspec.json.encode(devices))


def saved_fleet(folder: Path) -> list[EmulatedDevice]:
    """The fleet that an emulation was begun with. Raises FleetFileError."""
    try:
        data = (folder / FLEET_FILE).read_bytes()
        return msgspec.json.decode(data, type=list[EmulatedDevice])
    except (OSError, ValueError) as error:
        raise FleetFileError(f"{folder / FLEET_FILE}: cannot be read ({error})") from error


def _device(
    path: Path, where: str, entry: DeviceEntry, host: Profile, slow_motion: float | None
) -> EmulatedDevice:
    profile = _profile(path, where, entry.profile)
    ratio = profile.speed.factor.value / host.speed.factor.value
    if slow_motion is not None and ratio * slow_motion < 1.0 and not profile.speed.calibrated:
        raise FleetFileError(
            f"{path}: {where}: {profile.name} is {1.0 / ratio:.2g} times as fast as this machine "
            f"(host = {host.name!r}), which cannot stand for it at slow_motion = "
            f"{slow_motion:g}; leave it out, name the profile of a faster machine as host, or "
            'write slow_motion = "auto"'
        )
    link = profile.link
    shape = LinkShape(
        up_bits_s=_or(entry.up_bits_s, link.up_bits_s.value),
        down_bits_s=_or(entry.down_bits_s, link.down_bits_s.value),
        latency_s=_or(entry.latency_s, link.latency_s.value),
        loss=entry.loss,
    )
    delay = Delay(entry.delay_s, entry.delay, entry.spread)
    return EmulatedDevice(profile, shape, ratio, host.runtime.threads, delay)


def _or(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given


def _profile(path: Path, where: str, name: str) -> Profile:
    beside = path.parent / name
    try:
        return load_profile(str(beside) if beside.suffix.startswith(".toml") else name)
    except ProfileError as error:
        raise FleetFileError(f"{path}: {where}: {error}") from error
