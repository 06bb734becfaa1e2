"""How slow an emulation must be for this machine to keep up with its boards.

A fleet's devices begin a round at the same moment, and compute on the same few cores. The fastest
board's step has to be long enough that all of them are done with theirs within it; otherwise steps
come late, and the ratios of the boards are lost.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from edge_client.bundle import Bundle
from emulation.fleet import EmulatedDevice, Fleet
from server_node.config import Config

# Measured on two cores with eight boards (docs/profiles.md): what a device computes in a round
# beside its forwards, and how much longer forwards take beside others than alone.
_BESIDE_S: Final = 0.006
_CROWDED: Final = 1.5
# Shorter steps are lost in the delays of a scheduler whose machine has other things to do too.
_SHORTEST_S: Final = 0.03


class Settled(NamedTuple):
    """The devices as they will be emulated, and what a user should know of it; may be empty."""

    devices: list[EmulatedDevice]
    note: str
    warning: str


def settle(fleet: Fleet, bundle: Bundle, config: Config, turns: Path) -> Settled:
    """Measure the step on this machine, for all devices to use, and choose the slow motion.

    Nothing else should compute meanwhile. `turns`: where devices look for the measurement.
    Raises PaceError when the folder cannot be written.
    """
    directions = config.method.directions(bundle.manifest.parameters)
    kinds = {directions, 0} if config.evaluation.control else {directions}
    batch = config.devices.batch
    stands = [device.stand_in(turns) for device in fleet.devices]
    here_s = {kind: stands[0].here_s(bundle, batch, kind) for kind in kinds}[directions]
    there_s = [
        stand.calibrated_s(bundle.manifest.graph.sha256, batch, directions) or here_s * stand.ratio
        for stand in stands
    ]
    forwards, fastest_s = 2 * directions + 1, min(there_s)
    share = len(stands) / (os.cpu_count() or 1)
    crowd_s = share * (_CROWDED * forwards * here_s + _BESIDE_S)
    needed = max(1.0, here_s / fastest_s, max(crowd_s, _SHORTEST_S) / (forwards * fastest_s))
    fastest = fleet.devices[there_s.index(fastest_s)].profile.name
    takes = f"{fastest} takes {1e3 * forwards * fastest_s:.2g} ms for a round's forwards"
    return _settled(fleet, _round_up(needed), takes, faster=here_s > fastest_s)


def _settled(fleet: Fleet, needed: float, takes: str, *, faster: bool) -> Settled:
    factor = needed if fleet.slow_motion is None else fleet.slow_motion
    devices = [msgspec.structs.replace(device, slow_motion=factor) for device in fleet.devices]
    count = f"{len(devices)} device{'s' if len(devices) > 1 else ''}"
    cores = f"{os.cpu_count() or 1} cores"
    if factor < needed:
        return Settled(devices, "", (
            f"{takes}; {count} on {cores} need slow_motion = {needed:g} to keep to their boards' "
            f"speed, and the fleet says {factor:g}: steps may come late"
        ))  # fmt: skip
    if fleet.slow_motion is not None or factor == 1.0:
        return Settled(devices, "", "")
    text = f"{takes}: with {count} on {cores} everything takes {factor:g} times as long"
    if faster:
        return Settled(devices, "", f"a board is faster than this machine: {text}")
    return Settled(devices, f"slow motion: {text}", "")


def _round_up(factor: float) -> float:
    """To two digits."""
    if factor <= 1.0:
        return 1.0
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return round(math.ceil(factor / unit - 1e-9) * unit, 6)
