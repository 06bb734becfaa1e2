"""`musplit simulate`: an experiment on the virtual clock, in this process.

The run folder is that of any run, with the virtual time in rounds.csv; no trace and no device
reports, which tell of wall-clock times. A simulation that was stopped is started anew.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from emulation.delays import Delays, Presence, Timings
from emulation.fit import fit_timings
from emulation.inprocess import make_shards
from emulation.virtual_fleet import Boards, VirtualFleet, make_boards
from export.listing import forward_flops
from server_node.actions import Outcome
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError, DivergedError, NoProgressError
from server_node.files import CONTROL_FOLDER, claimed
from server_node.journal import JOURNAL_FILE
from server_node.plot import plot_run
from server_node.prepare import Experiment, prepare
from server_node.samples import Dataset
from server_node.summary import UNFINISHED_CONTROL, RunResult, result_of, summarise
from server_node.summary_file import write_summary
from wire_protocol.allocator import keep_freed_memory

Notify = Callable[[dict[str, Any]], None]

_VIRTUAL = "the clock is virtual"


class CurveRow(NamedTuple):
    """A closed round; bytes and forwards are sums over all devices since the beginning."""

    round: int
    simulated_s: float
    accuracy: float | None  # None where it was not evaluated
    loss: float | None
    bytes_up: int
    bytes_down: int
    client_forwards: int
    tau: int


class Played(NamedTuple):
    """A run that was simulated; `wall_s` is what it took here."""

    result: RunResult
    simulated_s: float
    wall_s: float
    client_forwards: int
    rows: list[CurveRow]


class Simulation:
    """A prepared experiment with its delays; play it with the client half learning, or frozen."""

    def __init__(self, config: Config, folder: Path, data: Dataset | None = None) -> None:
        """Makes the run folder. `data` is the configuration's data set, if it is loaded already."""
        section = config.simulation
        timings = fit_timings(Path(section.recorded)) if section.compute == "recorded" else None
        data = load_dataset(config.data) if data is None else data
        self.experiment = prepare(config, folder, data=data)
        self._boards: Boards = make_boards(self.experiment, make_shards(config, data))
        self._delays = make_delays(self.experiment, timings)
        self._presence = Presence(section, config.run.seed)

    def play(self, notify: Notify, *, frozen: bool = False) -> Played:
        """Run to its end, whichever; the journal and the metrics stay in the folder."""
        rows: list[CurveRow] = []
        begin_s = time.monotonic()

        def note(event: dict[str, Any]) -> None:
            if event["event"] == "round":
                cells = {name: event[name] for name in CurveRow._fields if name in event}
                rows.append(CurveRow(**cells, client_forwards=fleet.client_forwards))
            notify(event)

        fleet = VirtualFleet(
            self.experiment, self._boards, self._delays, self._presence, frozen=frozen, notify=note
        )
        notify({"event": "run", "frozen": frozen, "rounds_closed": 0})
        run = fleet.play()
        wall_s = time.monotonic() - begin_s
        result = result_of(run, wall_s, 0)
        return Played(result, fleet.now_s, wall_s, fleet.client_forwards, rows)


def simulate(config: Config, folder: Path, notify: Notify) -> dict[str, Any]:
    """Simulate the experiment and its control; returns the summary, also in FOLDER/summary.json.

    Raises DivergedError and NoProgressError; what was written so far stays.
    """
    keep_freed_memory()
    with claimed(folder):
        if any((place / JOURNAL_FILE).exists() for place in (folder, folder / CONTROL_FOLDER)):
            raise ConfigError(f"{folder}: holds a run already; give another --out, or remove it")
        simulation = Simulation(config, folder)
        experiment = simulation.experiment
        notify(
            {"event": "prepared", "folder": str(folder),
             "bundle_sha256": experiment.exported.digest,
             "parameters_client": experiment.exported.manifest.parameters,
             "parameters_server": experiment.exported.server_parameters,
             "data_notes": experiment.data_notes, "notes": experiment.exported.notes}
        )  # fmt: skip
        main = simulation.play(notify)
        if main.result.outcome == Outcome.STALLED.value:
            raise NoProgressError(f"{main.result.detail}; set {patience(config)}")
        diverged = main.result.outcome == Outcome.DIVERGED.value
        reason = "the run diverged" if diverged else experiment.no_control
        summary = _sum_up(experiment, main, reason or UNFINISHED_CONTROL)
        if not reason:  # whatever becomes of it, the run above is on disk
            summary = _sum_up(experiment, main, simulation.play(notify, frozen=True))
        notify({"event": "summary", **summary})
    if diverged:
        raise DivergedError(
            f"{main.result.detail} (method.eta_s, method.eta_c; fewer devices and directions want "
            f"smaller ones); the run so far is in {folder}"
        )
    return summary


def patience(config: Config) -> str:
    """The fields that let a run wait longer for devices, or not for all."""
    longer = "a longer round.stall_s"
    return longer if config.round.mode == "asynchronous" else f"round.deadline_s, or {longer}"


def simulate_curve(
    config: Config, data: Dataset | None = None, *, frozen: bool = False
) -> tuple[RunResult, list[CurveRow]]:
    """What became of a simulated run, and a row of each of its rounds; leaves no files."""
    with tempfile.TemporaryDirectory() as folder:
        played = Simulation(config, Path(folder), data).play(lambda _: None, frozen=frozen)
    return played.result, played.rows


def make_delays(experiment: Experiment, timings: Timings | None = None) -> Delays:
    """The delays of an experiment's configuration, for its client half."""
    config = experiment.config
    exported = experiment.exported
    flops = forward_flops(exported.halves.client, exported.manifest.inputs)
    return Delays(
        config.simulation, config.run.seed, directions=config.method.directions_client,
        forward_flop=float(flops * config.devices.batch), timings=timings,
    )  # fmt: skip


def _sum_up(experiment: Experiment, main: Played, control: Played | str) -> dict[str, Any]:
    """Write summary.json and the plot; `control` is the frozen-client run, or why there is none."""
    config, folder = experiment.config, experiment.folder
    beside = None if isinstance(control, str) else control
    summary = summarise(
        experiment, main.result, control if isinstance(control, str) else control.result, None
    )
    client_rounds = max(1, main.result.contributions)
    summary |= {
        "simulated_s": main.simulated_s,
        "simulated_s_control": beside.simulated_s if beside else None,
        "wall_s": round(main.wall_s, 3),
        "client_forwards": main.client_forwards,
        "client_forwards_per_client_round": round(main.client_forwards / client_rounds, 2),
        "broker_protocol_reason": _VIRTUAL,
    }
    write_summary(folder, summary)
    plot_run(folder, f"{config.data.source}, {config.model.name}, tau {config.method.tau}")
    return summary
