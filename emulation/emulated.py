"""What an emulated fleet came to: steps beside those of the boards, and modelled energy."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from emulation.fleet import EmulatedDevice
from server_node.config import Config
from server_node.recorder import read_reports
from wire_protocol.energy import ModelledByPhase
from wire_protocol.manifest import Manifest

TURNS_FOLDER: Final = "turns"


class Spent(NamedTuple):
    """What the reports say of one device in one run."""

    steps_s: list[float]  # perturbing and forwards of a round
    energy: dict[int, ModelledByPhase]  # so far, of each of its sessions


def emulated_rows(
    fleet: list[EmulatedDevice], folder: Path, config: Config, manifest: Manifest
) -> list[dict[str, Any]]:
    """Of each device: its board, its link, its steps, and what the board would have used.

    Seconds and rates are the board's: slow motion is taken out of them. `manifest` is the bundle's.
    The control is not in it.
    """
    spent = _spent(folder)
    return [
        {
            "device": index,
            "profile": device.profile.name,
            "threads": device.threads,
            "step_s_asked": _asked_s(device, folder, config, manifest),
            "step_source": "calibrated" if _calibrated(device, config, manifest) else "factor",
            "step_s_median": _median_s(device, spent[index]) if index in spent else None,
            **msgspec.to_builtins(device.link),
            "delay_s": device.delay.mean_s,
            "slow_motion": device.slow_motion,
            **(_energy(spent[index]) if index in spent else {}),
        }
        for index, device in enumerate(fleet)
    ]


def late_steps(rows: list[dict[str, Any]], tolerance: float = 0.1) -> str:
    """What to warn of when devices were slower than their boards; empty otherwise."""
    late = [
        str(row["device"])
        for row in rows
        if row["step_s_asked"]
        and (row["step_s_median"] or 0.0) > (1 + tolerance) * row["step_s_asked"]
    ]
    if not late:
        return ""
    return (
        f"steps of devices {', '.join(late)} took longer than on their boards: this machine is too "
        "busy for the fleet; use fewer or slower devices, or slow_motion"
    )


def _spent(folder: Path) -> dict[int, Spent]:
    found: dict[int, Spent] = {}
    for row in read_reports(folder):
        report = row.report
        spent = found.setdefault(row.device, Spent([], {}))
        if report.started_unix_s:
            spent.steps_s.append(report.perturb_s + report.forward_s)
        if isinstance(report.energy, ModelledByPhase):
            spent.energy[report.epoch] = report.energy
    return {device: spent for device, spent in found.items() if spent.steps_s}


def _asked_s(
    device: EmulatedDevice, folder: Path, config: Config, manifest: Manifest
) -> float | None:
    """A step on the board, as the device program was held to it; None before it was measured."""
    directions = config.method.directions(manifest.parameters)
    stand_in = device.stand_in(folder / TURNS_FOLDER)
    forward_s = stand_in.known_s(manifest.graph.sha256, config.devices.batch, directions)
    return None if forward_s is None else (2 * directions + 1) * forward_s


def _calibrated(device: EmulatedDevice, config: Config, manifest: Manifest) -> bool:
    directions = config.method.directions(manifest.parameters)
    stand_in, batch = device.stand_in(Path()), config.devices.batch
    return stand_in.calibrated_s(manifest.graph.sha256, batch, directions) is not None


def _median_s(device: EmulatedDevice, spent: Spent) -> float:
    return statistics.median(spent.steps_s) / device.slow_motion


def _energy(spent: Spent) -> dict[str, float]:
    """The sums over the device's sessions; docs/energy.md tells the model."""
    sessions = spent.energy.values()
    return {
        name: sum(getattr(energy, name) for energy in sessions)
        for name in ("modelled_j", "modelled_low_j", "modelled_high_j")
    }
