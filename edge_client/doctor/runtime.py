"""onnxruntime: the version against the profile's pin, and what the probe in a child found."""

from __future__ import annotations

import signal
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from edge_client.doctor.findings import Board, Findings, error, ok, warning
from edge_client.doctor.probe import DONE, Outcome
from firmware_profiles.catalogue import catalogue
from firmware_profiles.schema import Profile

PACKAGE: Final = "onnxruntime"
_MEANING: Final = {
    signal.SIGILL: "its wheel uses instructions that this processor lacks",
    signal.SIGBUS: "its wheel or the storage under it is damaged",
    signal.SIGKILL: "the kernel ended it, most likely for memory",
    signal.SIGABRT: "it gave up by itself",
}


def installed_version() -> str | None:
    """The version of onnxruntime that is installed, without importing it."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def check_runtime(
    board: Board, machine: str, installed: str | None, outcome: Outcome | None
) -> Findings:
    """The pin, the versions known to crash, and `outcome`, that of the probe."""
    remedy = _remedy(board.profile, machine, installed)
    if installed is None or outcome is None:
        yield error(
            PACKAGE, "is not installed", "the device runs its half of the model with it", remedy
        )
        return
    known = _known_crashes(board.profile, machine).get(installed)
    if outcome.stage != DONE or outcome.signal or outcome.exit_code:
        yield error(
            PACKAGE, f"{installed} {_death(outcome)}", _reason(outcome, known), remedy
        )  # fmt: skip
        return
    told = f"{installed} imports and runs a model in {outcome.seconds:.1f} s"
    if known is not None:
        yield warning(PACKAGE, f"{told}, but is a version to avoid", known, remedy)
        return
    yield ok(PACKAGE, told)
    profile = board.profile
    if profile is not None and installed != profile.runtime.onnxruntime:
        yield warning(
            "onnxruntime-pin", f"{installed}, the profile's pin is {profile.runtime.onnxruntime}",
            f"this version was not tried on {profile.title}; it ran the probe, no more", remedy,
        )  # fmt: skip
    elif profile is not None:
        yield ok("onnxruntime-pin", f"{installed}, as the profile says")


def _death(outcome: Outcome) -> str:
    if outcome.timed_out:
        return f"hung: '{outcome.stage}' did not end within {outcome.seconds:.0f} s"
    if outcome.signal:
        return f"died of {_signal_name(outcome.signal)} at '{outcome.stage}' in a child process"
    return f"failed at '{outcome.stage}'"


def _reason(outcome: Outcome, known: str | None) -> str:
    told = known and f"known: {known}"
    meaning = "" if outcome.timed_out else _MEANING.get(outcome.signal, "")  # type: ignore[call-overload]
    said = outcome.said and f"it said: {outcome.said}"
    return "; ".join(part for part in (told, meaning, said) if part) or "it gave no reason"


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def _remedy(profile: Profile | None, machine: str, installed: str | None) -> str:
    """Install the pin: the profile's, or those of the boards with this processor."""
    profiles = [profile] if profile else _alike(machine)
    crashes = {crash.version for p in profiles for crash in p.runtime.crashes}
    pins = {p.runtime.onnxruntime for p in profiles} - crashes - {installed}
    if not pins:
        return f"install another version: pip install '{PACKAGE}!={installed}'"
    return "install a version that works on this board: " + " or ".join(
        f"pip install {PACKAGE}=={pin}" for pin in sorted(pins)
    )


def _known_crashes(profile: Profile | None, machine: str) -> dict[str, str]:
    """Version -> why; without a profile, those of any board with this processor."""
    profiles = [profile] if profile else _alike(machine)
    return {crash.version: crash.why for p in profiles for crash in p.runtime.crashes}


def _alike(machine: str) -> list[Profile]:
    return [p for p in catalogue() if p.cpu.architecture == machine]
