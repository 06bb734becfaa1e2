"""What the device program counts its energy with: a meter, else a model, else a reason."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_client.power.find import MeterOptions, find_meter
from edge_client.power.model import board_model
from edge_client.power.source import EnergySource, MeterSource, ModelSource, NoSource, idle_power
from edge_client.power.sysfs import read_line
from firmware_profiles.catalogue import catalogue
from firmware_profiles.schema import Power, Profile
from wire_protocol.energy import NoEnergy
from wire_protocol.errors import UnmeasuredError


class Board(NamedTuple):
    """What the model needs to know of a board."""

    name: str
    power: Power
    cores: int
    threads: int  # that compute
    slow_motion: float = 1.0  # an emulation's seconds for one of the board's


class EnergyChoice(NamedTuple):
    """How a device's energy is to be counted."""

    meter: MeterOptions = MeterOptions()
    profile: Profile | None = None  # None: the one that this machine looks like
    stands_for: Board | None = None  # emulated: only the model counts
    require_measured: bool = False


def energy_source(
    choice: EnergyChoice, threads: int, say: Callable[[str], None], root: Path = Path("/")
) -> EnergySource:
    """The source, said in one line. Raises MeterError, and UnmeasuredError when that is required.

    With a meter, idle power is measured first, which takes some seconds.
    """
    profile = choice.profile or profile_here(root)
    found = (
        NoEnergy("it stands for another board")
        if choice.stands_for
        else find_meter(choice.meter, choice.profile, root)
    )
    if not isinstance(found, NoEnergy):
        idle_w = idle_power(found)
        idle = "not measured: readings are missing" if idle_w is None else f"{idle_w:.2f} W"
        say(f"energy: measured by {found.origin.driver} at {found.origin.boundary}; idle {idle}")
        return MeterSource(found, idle_w)
    if choice.require_measured:
        raise UnmeasuredError(f"energy is not measured here: {found.reason}")
    board = choice.stands_for or (
        None if profile is None else Board(profile.name, profile.power, profile.cpu.cores, threads)
    )
    if choice.meter.spec == "none" or board is None:
        reason = found.reason if board else f"{found.reason}; no profile fits, give --profile"
        say(f"energy: neither measured nor modelled: {reason}")
        return NoSource(reason)
    model = board_model(board.name, board.power, board.cores, board.threads)
    say(f"energy: modelled, not measured ({found.reason}): {model.text}")
    return ModelSource(model, board.slow_motion)


def profile_here(root: Path = Path("/")) -> Profile | None:
    """The profile of this machine by what the firmware calls it; any x86-64 is a laptop."""
    model = read_line(root / "proc/device-tree/model").rstrip("\0")
    known = catalogue()
    for profile in sorted(known, key=lambda profile: -len(profile.title)):
        if model and profile.title in model:
            return profile
    if platform.machine() in ("x86_64", "AMD64"):
        return next((profile for profile in known if profile.kind == "laptop"), None)
    return None
