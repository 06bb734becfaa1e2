"""What an emulated fleet came to: steps beside those of the boards, and modelled energy."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from emulation.fleet import EmulatedDevice
from firmware_profiles.schema import Profile
from server_node.config import Config
from server_node.recorder import read_reports
from wire_protocol.energy import EnergyModelled

TURNS_FOLDER: Final = "turns"
# Bounds of the model, of the value: boards of one kind, supplies and loads differ by as much.
_UNCERTAINTY: Final = 0.4


class Spent(NamedTuple):
    """Seconds of one device in one run."""

    steps_s: list[float]  # perturbing, forwards and encoding of a round
    busy_s: float  # the same, and replaying, of all rounds
    wait_s: float


def emulated_rows(
    fleet: list[EmulatedDevice], folder: Path, config: Config, digest: str
) -> list[dict[str, Any]]:
    """Of each device: its board, its link, its steps, and what the board would have used.

    `digest` is the bundle's. The control is not in it.
    """
    spent = _spent(folder)
    return [
        {
            "device": index,
            "profile": device.profile.name,
            "threads": device.profile.runtime.threads,
            "step_s_asked": _asked_s(device, folder, config, digest),
            "step_s_median": statistics.median(spent[index].steps_s) if index in spent else None,
            **msgspec.to_builtins(device.link),
            "delay_s": device.delay.mean_s,
            **(_energy(device, spent[index]) if index in spent else {}),
        }
        for index, device in enumerate(fleet)
    ]


def modelled(profile: Profile, busy_s: float, wait_s: float) -> EnergyModelled:
    """Idle power all the time, and the difference to load while the processor is busy."""
    idle, load = profile.power.idle, profile.power.load
    joules = idle.value_w * (busy_s + wait_s) + (load.value_w - idle.value_w) * busy_s
    return EnergyModelled(
        modelled_j=joules,
        modelled_low_j=(1.0 - _UNCERTAINTY) * joules,
        modelled_high_j=(1.0 + _UNCERTAINTY) * joules,
        window_s=busy_s + wait_s,
        boundary=idle.boundary,
        model=f"{idle.value_w:g} W idle, {load.value_w:g} W busy; +-{100 * _UNCERTAINTY:.0f} %",
        source=f"profile {profile.name}: {load.confidence}",
    )


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
        "busy for the fleet; use fewer or slower devices, or a larger model"
    )


def _spent(folder: Path) -> dict[int, Spent]:
    found: dict[int, Spent] = {}
    for row in read_reports(folder):
        report = row.report
        if report.started_unix_s:
            step_s = report.perturb_s + report.forward_s + report.encode_s
            steps_s, busy_s, wait_s = found.get(row.device, Spent([], 0.0, 0.0))
            found[row.device] = Spent(
                [*steps_s, step_s], busy_s + step_s + report.replay_s, wait_s + report.wait_s
            )
    return found


def _asked_s(device: EmulatedDevice, folder: Path, config: Config, digest: str) -> float | None:
    """A step on the board, as the device program was held to it; None before it was measured."""
    method = config.method
    directions = method.directions_client if method.eta_c else 0
    forward_s = device.stand_in(folder / TURNS_FOLDER).known_s(
        digest, config.devices.batch, directions
    )
    return None if forward_s is None else (2 * directions + 1) * forward_s


def _energy(device: EmulatedDevice, spent: Spent) -> dict[str, Any]:
    wait_s = spent.wait_s + device.delay.mean_s * len(spent.steps_s)
    fields = msgspec.to_builtins(modelled(device.profile, spent.busy_s, wait_s))
    return {
        "modelled_j": fields["modelled_j"], "modelled_low_j": fields["modelled_low_j"],
        "modelled_high_j": fields["modelled_high_j"], "modelled_window_s": fields["window_s"],
        "modelled_boundary": fields["boundary"], "modelled_by": fields["model"],
        "modelled_source": fields["source"],
    }  # fmt: skip
