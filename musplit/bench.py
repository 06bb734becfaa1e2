"""`musplit bench`: latency, memory and energy of client bundles on this machine, as evidence."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from musplit.support import (
    INTERRUPTED,
    FiniteRange,
    check_alone,
    fail,
    format_option,
    guarded,
    say,
)

if TYPE_CHECKING:
    from edge_client.bench.evidence import Evidence
    from edge_client.power.meter import Meter
    from wire_protocol.energy import NoEnergy

_FOLDER = click.Path(path_type=Path)
_BESIDE_RESUME = {"resume", "output", "require_measured"}


@click.command()
@click.option("--bundle", "bundles", multiple=True, type=_FOLDER, metavar="DIR",
              help="A client bundle, as `musplit export` writes it; repeatable, one per cut."
              )  # fmt: skip
@click.option("--model", help="Instead of --bundle: export this model first; needs torch.")
@click.option("--cut", "cuts", multiple=True, metavar="MODULE",
              help="With --model: where to cut; repeatable.  [default: every cut]")  # fmt: skip
@click.option("--input-shape", "shapes", multiple=True, metavar="[int:]N,N,..",
              help="With --model: as of `musplit export`.")  # fmt: skip
@click.option("--profile", help="Board profile, by name or path.  [default: this machine's]")
@click.option("--mode", type=click.Choice(["energy", "performance"]),
              help="performance: sample no power.  [default: energy, where a meter is found]"
              )  # fmt: skip
@click.option("--meter", default="auto", metavar="SPEC", show_default=True,
              help="The power meter, KIND or KIND:ARGUMENT.")  # fmt: skip
@click.option("--meter-hz", "rate_hz", type=FiniteRange(0.1, 1000), metavar="HZ",
              help="Of the power samples.  [default: what suits the meter]")  # fmt: skip
@click.option("--out", type=_FOLDER, metavar="EVIDENCE",
              help="Folder to write.  [default: evidence/bench-TIME]")  # fmt: skip
@click.option("--window-s", default=10.0, type=FiniteRange(0.05, 3600), show_default=True,
              metavar="S", help="Length of a window; below 10 the result is not reportable."
              )  # fmt: skip
@click.option("--repeats", default=5, type=click.IntRange(1, 100), show_default=True,
              help="Windows of forwards, and of steps; below 5: not reportable.")  # fmt: skip
@click.option("--batch", default=32, type=click.IntRange(1, 1_000_000), show_default=True,
              help="Samples a forward.")  # fmt: skip
@click.option("--directions", default=16, type=click.IntRange(1, 1_000_000), show_default=True,
              help="K: a step is 2 K + 1 forwards.")  # fmt: skip
@click.option("--encoding", default="float32", show_default=True,
              type=click.Choice(["float32", "float16", "int8"]),
              help="Of a step's frames.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 1024),
              help="Threads of ONNX Runtime.  [default: the profile's]")  # fmt: skip
@click.option("--gpio", default="", metavar="PIN",
              help="PIN or CHIP:PIN that is high during every window, for an external analyser; "
              "file:PATH: the edges as rows of a file.")  # fmt: skip
@click.option("--require-measured", is_flag=True, help="Fail unless every energy was measured.")
@click.option("--resume", type=_FOLDER, metavar="EVIDENCE",
              help="Take the windows that this folder lacks.")  # fmt: skip
@format_option
@click.pass_context
def bench(
    context: click.Context, /, bundles: tuple[Path, ...], model: str | None, cuts: tuple[str, ...],
    shapes: tuple[str, ...], profile: str | None, mode: str | None, out: Path | None,
    require_measured: bool, resume: Path | None, output: str, **asked: Any,
) -> None:  # fmt: skip
    """Measure latency, memory and energy of client bundles on this machine.

    In the manner of MLPerf Tiny: after a warm-up, windows of at least 10 s, the median of 5, energy
    and latency from the same windows, temperature, clock and throttling beside each. Writes one
    folder of evidence: raw samples with their digests, results.json, plots, report.html. Ctrl-C
    keeps what is done.

    \b
    musplit bench --bundle halves/client --out evidence
    musplit bench --model resnet18 --cut layer1 --cut layer2
    musplit bench --resume evidence
    """
    with guarded():
        from edge_client.bench.prepare import Asked, begin, choose_meter, go_on
        from edge_client.power.choose import profile_here
        from firmware_profiles.catalogue import load_profile
        from wire_protocol.energy import NoEnergy

        if resume is not None:
            typed = click.core.ParameterSource.COMMANDLINE
            given: dict[str, object] = {
                option.opts[0]: True
                for option in context.command.params
                if option.name not in _BESIDE_RESUME
                and context.get_parameter_source(option.name or "") is typed
            }
            check_alone(resume, given)
            evidence, meter = go_on(resume)
        else:
            if bool(bundles) == (model is not None):
                fail("bench: give --bundle DIR (repeatable), or --model NAME", 2)
            if model is None and (cuts or shapes):
                fail("bench: --cut and --input-shape go with --model", 2)
            board = load_profile(profile) if profile else profile_here(Path("/"))
            wanted = Asked(**asked)
            meter = choose_meter(wanted, board, mode, required=require_measured)
            if isinstance(meter, NoEnergy):
                say(f"energy is not measured: {meter.reason}")
            folder = out or Path("evidence") / f"bench-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
            if model is not None:
                bundles = _export(model, cuts, shapes, folder)
            evidence = begin(folder, bundles, meter, board, wanted)
        _run(evidence, meter, output, required=require_measured)


def _export(
    model: str, cuts: tuple[str, ...], shapes: tuple[str, ...], out: Path
) -> tuple[Path, ...]:
    """Client bundles of a model, below the evidence folder."""
    from edge_client.bench.evidence import BUNDLES_FOLDER
    from export.exporter import export_model
    from export.listing import list_cuts
    from export.models import build_model

    with redirect_stdout(sys.stderr):  # the user's model may print
        named = cuts or [c.cut for c in list_cuts(build_model(model, 0, shapes)).cuts]
        folders = [out / BUNDLES_FOLDER / str(number) for number in range(len(named))]
        return tuple(
            export_model(model, cut, folder, seed=0, input_shape=shapes).client
            for cut, folder in zip(named, folders, strict=True)
        )


def _run(evidence: Evidence, meter: Meter | NoEnergy, output: str, *, required: bool) -> None:
    """Take the windows, write the report, show it."""
    from edge_client.bench.report import REPORT_FILE, write_report
    from edge_client.bench.results import IterationEnergy
    from edge_client.bench.runner import planned_s, run_bench
    from edge_client.bench.summary import as_json, table
    from wire_protocol.energy import NoEnergy
    from wire_protocol.errors import UnmeasuredError

    interrupted = False
    planned = planned_s(evidence.configuration, evidence.missing())
    say(f"evidence in {evidence.folder}; about {planned / 60:.1f} min")
    sampled = None if isinstance(meter, NoEnergy) else meter
    try:
        with _Progress(planned) as progress:
            run_bench(evidence, sampled, progress.show)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if sampled is not None:
            sampled.close()
    results, _ = write_report(evidence)
    if output == "json":
        print(as_json(results, folder=str(evidence.folder)))
    else:
        print(table(results))
    say(f"report: {evidence.folder / REPORT_FILE}")
    if interrupted:
        fail(f"interrupted; go on with: musplit bench --resume {evidence.folder}", INTERRUPTED)
    figures = [f for cut in results.cuts for f in (cut.forward, cut.step) if f is not None]
    if required and not all(isinstance(f.energy, IterationEnergy) for f in figures):
        raise UnmeasuredError(f"{evidence.folder}: energy was not measured in every window")


class _Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, planned_s: float) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar = click.progressbar(
            length=max(1, round(planned_s * 10)), file=sys.stderr, width=24,
            item_show_func=lambda what: what or "",
        )  # fmt: skip
        self._shown = 0
        self._what = ""

    def show(self, done_s: float, what: str) -> None:
        """`done_s` of the planned seconds are done."""
        now = round(done_s * 10)
        if self._terminal:
            self._bar.update(max(0, now - self._shown), what)
            self._shown = max(now, self._shown)
        elif what != self._what:
            say(what)
        self._what = what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._terminal:
            self._bar.render_finish()
