"""A plan for people and for programs, and the file that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from server_node.config import to_toml
from server_node.files import replace_file
from studies.planner.plan import Candidate, Plan
from studies.planner.reasons import seconds

PLAN_FILE: Final = "plan.toml"


def text(plan: Plan) -> str:
    """The best candidates, the advice, why, and what limits forbid."""
    best = plan.candidates[0]
    header = ("", "cut", "tau", "K", "K_s", "encoding", "eta_c", "eta_s", "rounds", "a round",
              "to target")  # fmt: skip
    rows = [header, *(_row(rank, one) for rank, one in enumerate(plan.candidates, 1))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lines += [
        "",
        f"advice: {best.choice.probe}, {best.choice.encoding}",
        f"to {plan.target:g}: predicted {best.rounds} rounds, {seconds(best.total_s)}",
        _simulated(plan),
        "",
        *(f"- {reason}" for reason in plan.reasons),
    ]
    if plan.excluded:
        lines += ["", "forbidden by a limit:", *(f"- {line}" for line in plan.excluded)]
    made, used = plan.runs_made, len(plan.found)
    lines += ["", f"measured settings: {used}, {made} of them now, {used - made} from the table"]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs; times in seconds."""
    return {
        "target": plan.target,
        "advice": _facts(plan.candidates[0]),
        "simulated": plan.checked._asdict(),
        "candidates": [_facts(candidate) for candidate in plan.candidates],
        "reasons": plan.reasons,
        "excluded": plan.excluded,
        "measured": [
            {**one.probe._asdict(), "rounds": one.rounds, "limit": one.limit,
             "diverged": one.diverged}
            for one in plan.found
        ],
        "runs_made": plan.runs_made,
    }  # fmt: skip


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write FOLDER/plan.toml, the advice as a configuration; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_FILE
    replace_file(path, lambda file: file.write(to_toml(plan.config).encode()))
    return path


def _simulated(plan: Plan) -> str:
    checked = plan.checked
    if checked.rounds is None or checked.seconds is None:
        most = plan.config.run.rounds
        return f"SIMULATED, it was not reached in {most} rounds: take smaller steps or another seed"
    share = checked.seconds / plan.candidates[0].total_s
    return (
        f"simulated: {checked.rounds} rounds, {seconds(checked.seconds)} ({share:.2f} of the "
        f"prediction), a round {seconds(checked.seconds / checked.rounds)}; "
        f"{checked.accuracy:.3f} at the end"
    )


def _row(rank: int, one: Candidate) -> tuple[str, ...]:
    probe = one.choice.probe
    return (
        str(rank), probe.cut, str(probe.tau), str(probe.directions_client),
        str(probe.directions_server), one.choice.encoding, f"{one.eta_c:.3g}", f"{one.eta_s:.3g}",
        str(one.rounds), seconds(one.round_s), seconds(one.total_s),
    )  # fmt: skip


def _facts(one: Candidate) -> dict[str, Any]:
    probe = one.choice.probe
    return {
        "cut": probe.cut, "tau": probe.tau, "directions_client": probe.directions_client,
        "directions_server": probe.directions_server, "perturb": list(probe.perturb),
        "encoding": one.choice.encoding, "eta_c": one.eta_c, "eta_s": one.eta_s,
        "rounds": one.rounds, "round_s": one.round_s, "total_s": one.total_s,
    }  # fmt: skip
