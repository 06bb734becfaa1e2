"""A board's own profile: what a bench measured stands in place of what was assumed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_client.bench.results import CutResult, IterationEnergy, Results
from edge_client.bench.toml_text import to_toml
from edge_client.errors import EvidenceError
from edge_client.files import replacing
from firmware_profiles.catalogue import parse_profile
from firmware_profiles.schema import Calibrated, Power, Profile, Watts


class Calibration(NamedTuple):
    """The new profile, and what was replaced or kept and why, one line each."""

    profile: Profile
    changes: list[str]


def calibrate(results: Results, profile: Profile) -> Calibration:
    """Replace assumed numbers of `profile`. Raises EvidenceError when nothing can be.

    An entry of speed.calibrated of the same graph, batch, threads and directions is replaced;
    others stay. Idle and load power are replaced together, since a profile has both at one place.
    """
    machine = results.environments[0].machine
    if machine != profile.cpu.architecture:
        raise EvidenceError(
            f"evidence of a machine with {machine}, profile {profile.name} is of "
            f"{profile.cpu.architecture}: calibrate the board's own profile"
        )
    source = _source(results)
    entries = list(_entries(results, source))
    if not entries:
        raise EvidenceError(
            "the evidence holds no window of steps: nothing to calibrate by; finish the bench"
        )
    changes = [
        f"speed.calibrated: {e.cut}, batch {e.batch}, {e.directions} directions, {e.threads} "
        f"threads: {e.step_s:g} s"
        for e in entries
    ]
    if results.configuration.threads != profile.runtime.threads:
        changes.append(
            f"emulation uses the profile's runtime.threads, {profile.runtime.threads}, and no "
            "entry of another number: bench with these, or change that field"
        )
    kept = [e for e in profile.speed.calibrated if _key(e) not in {_key(new) for new in entries}]
    power, told = _power(results.cuts, profile.power, source)
    speed = msgspec.structs.replace(profile.speed, calibrated=[*kept, *entries])
    changed = msgspec.structs.replace(profile, power=power, speed=speed)
    return Calibration(changed, [*changes, told])


def _source(results: Results) -> str:
    date = results.environments[0].started.partition("T")[0]
    text = f"musplit bench {date}, evidence sha256 {results.evidence_sha256}"
    if not results.reportable:
        text += f", not reportable: {results.not_reportable[0]}"
    return text


def _entries(results: Results, source: str) -> Iterable[Calibrated]:
    asked = results.configuration
    for cut in results.cuts:
        if cut.step is not None and cut.step.phases is not None:
            yield Calibrated(
                graph=cut.graph, cut=cut.cut, batch=asked.batch, threads=asked.threads,
                directions=asked.directions, step_s=cut.step.phases.compute_s, source=source,
            )  # fmt: skip


def _key(entry: Calibrated) -> tuple[str, int, int, int]:
    return entry.graph, entry.batch, entry.threads, entry.directions


def _power(cuts: Iterable[CutResult], power: Power, source: str) -> tuple[Power, str]:
    """Of the cut whose steps draw most: load is that of a board that computes, and no more."""
    steps = [c.step.energy for c in cuts if c.step is not None]
    drawn = [e for e in steps if isinstance(e, IterationEnergy) and e.idle_w is not None]
    highest = max(drawn, key=lambda e: e.mean_w, default=None)
    if highest is None or highest.idle_w is None:
        return power, "power: kept, none was measured"
    boundary = highest.origin.boundary
    if highest.mean_w <= highest.idle_w:
        return power, "power: kept, a step drew no more than idle"
    idle = Watts(highest.idle_w, boundary, f"{source}, program loaded", "measured")
    load = Watts(highest.mean_w, boundary, f"{source}, steps", "measured")
    told = f"power: idle {idle.value_w:g} W, load {load.value_w:g} W, {boundary}"
    return msgspec.structs.replace(power, idle=idle, load=load), told


def write_profile(profile: Profile, path: Path) -> None:
    """As TOML that `load_profile` reads back. Raises EvidenceError, ProfileError."""
    text = to_toml(msgspec.to_builtins(profile))
    parse_profile(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
