"""The planner: limits first, then seconds a round, then rounds where they decide, then a check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from server_node.config import Config, load_config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from studies.planner.check import Checked, check
from studies.planner.choice import Choice, Probe
from studies.planner.cuts import model_cuts
from studies.planner.errors import NoPlanError
from studies.planner.fleet import Fleet
from studies.planner.learning import EVERY, LearningTable, Observed, probe_config
from studies.planner.options import Options
from studies.planner.reasons import excluded_lines, reasons
from studies.planner.search import Found, search
from studies.planner.timing import mean_seconds, server_seconds, simulation

_SHOWN: Final = 5
# A setting runs so many rounds at least, even where it must be slower than the best.
_LEAST_ROUNDS: Final = 2 * EVERY
# A run stalls when nothing happens for so many mean rounds.
_PATIENCE_ROUNDS: Final = 20


class Candidate(NamedTuple):
    """A measured choice, predicted."""

    choice: Choice
    rounds: int
    round_s: float
    eta_c: float
    eta_s: float

    @property
    def total_s(self) -> float:
        """To the target."""
        return self.rounds * self.round_s


class Plan(NamedTuple):
    """An advice: candidates are the best first, each setting with its best step sizes."""

    target: float
    candidates: list[Candidate]
    reasons: list[str]
    excluded: list[str]
    checked: Checked
    found: list[Found]
    runs_made: int
    config: Config  # the advice's, with the fleet as [simulation]


def base_config(model: str, fleet: Fleet, data: str | None, overrides: list[str]) -> Config:
    """What all choices have in common. Raises ConfigError where the planner knows no rounds."""
    for override in overrides:
        field = override.partition("=")[0].strip()
        if field in ("devices.count", "model.name"):
            raise ConfigError(f"--set {field}: FLEET and MODEL say that; change them instead")
    given = [f"data.source={data}"] if data is not None else []
    count = [f"model.name={model}", f"devices.count={len(fleet.kinds)}"]
    config = load_config(None, [*given, *overrides, *count])
    unknown = {
        "round.mode": config.round.mode != "barrier",
        "round.deadline_s": config.round.deadline_s > 0,
        "method.tau_mode": config.method.tau_mode != "fixed",
        "method.feedback": config.method.feedback != "loss_difference",
        "method.server_order": config.method.server_order != "zeroth",
        "method.server_batch": config.method.server_batch == "pooled",
    }
    for field, is_set in unknown.items():
        if is_set:
            raise ConfigError(
                f"--set {field}: plans are for full barriers, a fixed tau, zeroth order in "
                "both halves and steps on each device's own batch; leave it out"
            )
    return config


def plan(
    base: Config, fleet: Fleet, target: float, budget: int, table: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:  # fmt: skip
    """Advise; `say` hears of each measured setting.

    Raises NoPlanError naming the limits, ModelError, DataError, ConfigError.
    """
    data = load_dataset(base.data)
    model = model_cuts(base, data)
    options = Options(fleet, base, model)
    excluded = excluded_lines(options)
    if not options.round_s:
        raise NoPlanError(f"a limit forbids every choice: {'; '.join(excluded)}")
    learned = LearningTable(table, data, model.source)

    def observe(probe: Probe, limit: int) -> Observed:
        config = probe_config(options.config(probe), fleet.search.holdout)
        seen = learned.observe(config, target, limit)
        end = "diverged" if seen.diverged else f"target not within {limit} rounds"
        end = end if seen.rounds is None else f"target after {seen.rounds} rounds"
        say(f"{probe}, eta_s {config.method.eta_s:g}: {end}")
        return seen

    found = search(options.round_s, observe, budget, base.run.rounds, _LEAST_ROUNDS)
    candidates = _ranked(options, found)
    if not candidates:
        raise NoPlanError(
            f"none of {len(found)} measured settings reached {target} within {base.run.rounds} "
            "rounds: lower --target, raise --budget or --set run.rounds, or check method.eta_c "
            "and method.eta_s"
        )
    best = candidates[0]
    config = planned_config(options, best.choice)
    checked = check(config, data, target)
    said = reasons(options, best.choice, found)
    return Plan(
        target, candidates[:_SHOWN], said, excluded, checked, found, learned.made, config
    )  # fmt: skip


def planned_config(options: Options, choice: Choice) -> Config:
    """A choice as a run's configuration, for emulate, serve and simulate."""
    fleet, config = options.fleet, options.config(choice.probe)
    cut = options.cuts[choice.probe.cut]
    step_s, measure_s = server_seconds(
        fleet, cut, config.devices.batch, choice.probe.directions_server
    )
    mean_s = mean_seconds(fleet, config, cut, choice.probe.directions_client)
    # Nothing comes from a device while it computes: that is no stall.
    stall_s = max(config.round.stall_s, _PATIENCE_ROUNDS * options.round_s[choice.probe])
    return msgspec.structs.replace(
        config, round=msgspec.structs.replace(config.round, stall_s=stall_s),
        wire=msgspec.structs.replace(config.wire, encoding=choice.encoding),
        simulation=simulation(fleet, mean_s, step_s, measure_s),
    )  # fmt: skip


def _ranked(options: Options, found: list[Found]) -> list[Candidate]:
    """The settings that reached the target, the fastest first, each once."""
    candidates = [
        Candidate(
            options.choices[one.probe], one.rounds, options.round_s[one.probe],
            options.config(one.probe).method.eta_c, options.config(one.probe).method.eta_s,
        )
        for one in found
        if one.rounds is not None
    ]  # fmt: skip
    candidates.sort(key=lambda candidate: candidate.total_s)
    settings: dict[Probe, Candidate] = {}
    for candidate in candidates:
        settings.setdefault(candidate.choice.probe._replace(level=0), candidate)
    return list(settings.values())
