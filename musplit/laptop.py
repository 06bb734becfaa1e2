"""The commands that run whole experiments in one place: emulate, simulate, study, plan."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from musplit.support import (
    FiniteRange,
    check_alone,
    default_config,
    fail,
    format_option,
    guarded,
    resume_option,
    run_folder,
    say,
    set_option,
)


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--data", help="Data set: 'digits', an .npz or .csv file, a folder of IDX files "
              "or of images by class.")  # fmt: skip
@set_option
@click.option("--rounds", type=int, help="Same as --set run.rounds=N.")
@click.option("--clients", type=int, help="Same as --set devices.count=N.")
@click.option("--seed", type=int, help="Same as --set run.seed=N.")
@click.option("--fleet", metavar="FLEET", help="TOML file of boards and links that the devices "
              "stand for; same as --set emulation.fleet=FLEET.")  # fmt: skip
@click.option("--quick", is_flag=True, help="A few rounds, to see that everything works.")
@click.option("--out", type=click.Path(path_type=Path),
              help="Run folder.  [default: runs/NAME-TIME]")  # fmt: skip
@click.option("--require", "required", multiple=True, metavar="FIELD>=VALUE",
              help="Fail unless the summary has it; repeatable: accuracy>=0.9")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path),
              help="Write the requirements as a JUnit report.")  # fmt: skip
@resume_option
@click.option("--require-measured", is_flag=True,
              help="End with code 8: emulated devices never measure energy.")  # fmt: skip
@format_option
def emulate(
    config: Path | None, data: str | None, overrides: tuple[str, ...], rounds: int | None,
    clients: int | None, seed: int | None, fleet: str | None, quick: bool, out: Path | None,
    required: tuple[str, ...], junit: Path | None, resume: Path | None,
    require_measured: bool, output: str,
) -> None:  # fmt: skip
    """Run broker, server and devices as processes on this machine, and stop them all.

    CONFIG defaults to the digits experiment. Exit code 1 when a --require does not hold. What is
    killed is started again; --resume goes on with an emulation that was stopped as a whole.

    \b
    musplit emulate
    musplit emulate --quick --format json
    musplit emulate --data fashion/ --set model.name=mlp:784-32-32-10 --rounds 100
    musplit emulate --fleet boards.toml
    musplit emulate --require 'accuracy>=0.9' --junit report.xml
    musplit emulate --resume runs/digits-20260101-120000
    """
    if require_measured:
        fail(
            "energy is not measured here: emulated devices stand for boards, and their energy is "
            "modelled; leave out --require-measured, or run boards with musplit serve", 8
        )  # fmt: skip
    with guarded("emulation"):
        from musplit.emulation import run_emulation

        if fleet is not None and clients is not None:
            fail("--clients: the fleet file says how many devices there are; leave it out", 2)
        path = config or default_config()
        shorthand = {"data.source": data, "run.rounds": rounds, "devices.count": clients,
                     "run.seed": seed, "emulation.fleet": fleet}  # fmt: skip
        given = [f"{key}={value}" for key, value in shorthand.items() if value is not None]
        quick_fields = ["run.rounds=30", "evaluation.every=5"] if quick else []
        fields = [*quick_fields, *given, *overrides]
        if resume is not None:
            check_alone(
                resume, {"CONFIG": config, "--out": out, "--set and its shorthands": fields}
            )
        code = run_emulation(
            path, fields, resume or out or run_folder(path), list(required), junit, output,
            resume=resume is not None,
        )  # fmt: skip
    sys.exit(code)


@click.command()
@click.argument("model")
@click.option("--fleet", "fleet_file", required=True, metavar="FLEET",
              type=click.Path(path_type=Path), help="TOML file: devices, links, server."
              )  # fmt: skip
@click.option("--data", help="Data set, as of emulate.  [default: digits]")
@click.option("--target", default=0.65, show_default=True,
              type=FiniteRange(0, 1, min_open=True), help="Accuracy to reach.")  # fmt: skip
@click.option("--budget", default=24, show_default=True, type=click.IntRange(1, 10_000),
              help="Settings to measure at most; those in the table cost nothing.")  # fmt: skip
@click.option("--table", default="runs/rounds.json", show_default=True, metavar="FILE",
              type=click.Path(path_type=Path), help="Where measured rounds are kept.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder for plan.toml, the advice as a configuration.")  # fmt: skip
@set_option
@format_option
def plan(
    model: str, fleet_file: Path, data: str | None, target: float, budget: int, table: Path,
    out: Path | None, overrides: tuple[str, ...], output: str,
) -> None:  # fmt: skip
    """Recommend cut, tau, K and encoding for a fleet, say why, and what limits forbid.

    MODEL as of export. Rounds to the target are measured by short runs in this process, once for
    every model, data set and number of devices; seconds a round come from FLEET.

    \b
    musplit plan mlp:64-32-32-10 --fleet lab.toml --target 0.8 --out plan
    musplit simulate plan/plan.toml
    """
    with guarded("emulation"):
        from studies.planner.fleet import load_fleet
        from studies.planner.plan import base_config
        from studies.planner.plan import plan as make_plan
        from studies.planner.report import as_json, text, write_plan

        with redirect_stdout(sys.stderr):
            fleet = load_fleet(fleet_file)
            base = base_config(model, fleet, data, list(overrides))
            for folder in (table.parent, *([out] if out is not None else [])):
                folder.mkdir(parents=True, exist_ok=True)  # before the long work, not after
            advice = make_plan(base, fleet, target, budget, table, say)
        print(json.dumps(as_json(advice)) if output == "json" else text(advice))
        if out is not None:
            say(f"advice as a configuration: {write_plan(advice, out)}")


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@set_option
@click.option("--fit", type=click.Path(path_type=Path), metavar="RUN",
              help="Take the times of devices and server from this run folder.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Run folder.  [default: runs/NAME-TIME]")  # fmt: skip
@click.option("--require", "required", multiple=True, metavar="FIELD>=VALUE",
              help="Fail unless the summary has it; repeatable: accuracy>=0.9")  # fmt: skip
@format_option
def simulate(
    config: Path | None, overrides: tuple[str, ...], fit: Path | None, out: Path | None,
    required: tuple[str, ...], output: str,
) -> None:  # fmt: skip
    """Run an experiment on a virtual clock, in one process: thousands of devices, no waiting.

    CONFIG defaults to the digits experiment; its section [simulation] says what devices, links and
    server take. With a full barrier and a fixed tau the weights are those of musplit emulate. A
    simulation that was stopped is started anew: there is no --resume. Exit code 1 when a --require
    does not hold.

    \b
    musplit simulate --set simulation.compute=exponential --set simulation.server_step_s=0.1
    musplit simulate big.toml --set devices.count=1000 --set devices.participants=100
    musplit simulate other.toml --fit runs/digits-20260101-120000
    """
    with guarded("emulation"):
        from musplit.simulation import run_simulation

        path = config or default_config()
        fields = list(overrides)
        if fit is not None:
            fields += ["simulation.compute=recorded", f"simulation.recorded={fit}"]
        code = run_simulation(path, fields, out or run_folder(path), list(required), output)
    sys.exit(code)


@click.command()
@click.argument("name", required=False, metavar="NAME|FILE")
@click.option("--data", default="", metavar="DIR",
              help="Stands for {data} in the study's data.source, or is that itself.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Study folder; a study that was cut goes on in it.  [default: runs/study-NAME]"
              )  # fmt: skip
@click.option("--seeds", default=0, type=click.IntRange(0, 1000),
              help="Test seeds 0 .. N - 1.  [default: the file's]")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 1024),
              help="Runs side by side, a thread each.  [default: the processor's cores]"
              )  # fmt: skip
@set_option
@click.option("--setting", "settings", multiple=True, metavar="NAME",
              help="Only this setting; repeatable.")  # fmt: skip
@click.option("--arm", "arms", multiple=True, metavar="NAME",
              help="Only this arm of the file, its control included; repeatable.")  # fmt: skip
@click.option("--quick", is_flag=True,
              help="10 rounds, 2 trials, 1 seed: to see that everything works.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be run, and run nothing.")
@click.option("--list", "listing", is_flag=True, help="List the studies that ship with musplit.")
@click.option("--show", is_flag=True, help="Print the study's TOML, to copy and change.")
def study(
    name: str | None, data: str, out: Path | None, seeds: int, jobs: int | None,
    overrides: tuple[str, ...], settings: tuple[str, ...], arms: tuple[str, ...], quick: bool,
    dry_run: bool, listing: bool, show: bool,
) -> None:  # fmt: skip
    """Run arms x settings x seeds side by side; write tables with spread, raw CSV and plots.

    NAME is a study of the library, FILE a TOML file of your own: an [[arm]] is what is compared, a
    [[setting]] under which circumstances. Arms are tuned on a part of the training set, all by the
    same budget; the test set is only seen by the chosen values. Every finished run is a file: the
    same command goes on after Ctrl-C or a crash. --set changes [base], which settings and arms
    still override. Exit code 1 when a run failed; the others are there.

    \b
    musplit study --list
    musplit study noniid --data fashion/ --dry-run
    musplit study noniid --data fashion/ --jobs 4
    musplit study feedback --show > mine.toml
    musplit study mine.toml --seeds 5 --set run.rounds=100
    """
    with guarded("emulation"):
        if listing:
            from musplit.study import print_library

            print_library()
            return
        if name is None:
            fail("study: give NAME or FILE; --list shows the names", 2)
        if show:
            from studies.definition import study_text

            print(study_text(name)[1], end="")
            return
        from studies.matrix import Options

        options = Options(data, overrides, seeds, quick, settings, arms)
        from musplit.study import print_plan, run_study

        if dry_run:
            print_plan(name, options)
            return
        code = run_study(name, options, out, jobs)
    sys.exit(code)
