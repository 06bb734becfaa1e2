"""All checks in order, in two parts. One that fails itself is a finding too.

The first part imports no numpy: a wheel that crashes must kill the probe's child, not the doctor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from edge_client.doctor.findings import Board, Finding, Findings, error
from edge_client.doctor.probe import Outcome, probe_runtime
from edge_client.doctor.runtime import check_runtime, installed_version
from edge_client.doctor.system import check_system, this_system

# An import takes a second on a board, and half a minute under an emulator.
_PROBE_LIMIT_S: Final = 180.0


def probe() -> Outcome | None:
    """Run the probe, before anything starts a thread; None without onnxruntime."""
    return None if installed_version() is None else probe_runtime(_PROBE_LIMIT_S)


def diagnose_system(board: Board, outcome: Outcome | None) -> Iterator[Finding]:
    """The system, and what the probe found."""
    system = this_system()
    yield from guarded("system", lambda: check_system(board, system))
    yield from guarded(
        "onnxruntime", lambda: check_runtime(board, system, installed_version(), outcome)
    )


def guarded(check: str, run: Callable[[], Findings]) -> Iterator[Finding]:
    """The findings of `run`; an exception becomes one."""
    try:
        yield from run()
    except Exception as failure:  # noqa: BLE001 - a check that fails must not hide the others
        yield error(
            check, f"could not be checked: {type(failure).__name__}: {failure}",
            "this is unexpected", "report it, with the output of musplit doctor --format json",
        )  # fmt: skip
