"""The commands about models: `musplit export`, `musplit evaluate`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from musplit.support import (
    fail,
    format_option,
    guarded,
    say,
)

_SEED = click.IntRange(0, (1 << 63) - 1)
_SHAPE_HELP = (
    "Sample shape without the batch, e.g. 1,28,28, or int:64 for integers; needed for your own "
    "model, once per input."
)


@click.command()
@click.argument("model", required=False)
@click.option("--from-run", "run", type=click.Path(path_type=Path), metavar="RUN",
              help="Instead of MODEL: a run folder, whose trained model is written to OUT."
              )  # fmt: skip
@click.option("--cut", help="Module after which to cut; it stays on the device.")
@click.option("--list-cuts", is_flag=True, help="List all cuts, what they cost, and write nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--seed", default=0, type=_SEED, show_default=True, help="Of the initial weights.")
@click.option("--input-shape", "shapes", multiple=True, metavar="[int:]N,N,..", help=_SHAPE_HELP)
@click.option("--weights", type=click.Path(path_type=Path),
              help="A safetensors file with the weights to start from.")  # fmt: skip
@click.option("--perturb", multiple=True, metavar="WHAT",
              help="What the device trains: tensor names, norms, adapters:R, or none; repeatable.  "
              "[default: everything]")  # fmt: skip
@format_option
def export(
    model: str | None, run: Path | None, cut: str | None, list_cuts: bool, out: Path | None,
    seed: int, shapes: tuple[str, ...], weights: Path | None, perturb: tuple[str, ...], output: str,
) -> None:  # fmt: skip
    """Cut a model in two: OUT/client for the devices, OUT/server, which never leaves the server.

    MODEL is one of mlp:64-32-32-10, lenet, alexnet, resnet18, resnet18-bn, mobilenetv2,
    mobilenetv2-bn, stem:256, or path/to/file.py:factory, a function or class that gives an
    nn.Module. All but mlp and stem take options in any order: a number is the classes, cN the
    channels, wN the width: resnet18:100, alexnet:10:c1:w8. Every export is proved against torch
    with perturbed weights.

    \b
    musplit export resnet18 --list-cuts
    musplit export mlp:64-32-32-10 --cut fc1 --out halves
    musplit export my_model.py:make --cut body.1 --input-shape 1,28,28 --out halves
    musplit export tokens.py:Net --cut embedding --input-shape int:64 --out halves

    With --from-run the whole trained model comes out, and needs musplit no more: model.onnx takes
    raw samples as the data set holds them, model.safetensors the weights by the model's own names,
    model.json says which inputs and classes; proved against the split pair.

    \b
    musplit export --from-run runs/digits-20260101-120000 --out trained
    """
    with guarded():
        if (model is None) == (run is None):
            fail("export: give MODEL, or --from-run RUN", 2)
        if run is not None:
            _export_run(run, out, output)
            return
        assert model is not None
        if list_cuts:
            _print_cuts(model, seed, shapes, output)
            return
        if cut is None or out is None:
            fail("export: needs --cut and --out, or --list-cuts to see the cuts", 2)
        from export.exporter import export_model

        with redirect_stdout(sys.stderr):  # the user's model may print
            result = export_model(
                model, cut, out, seed=seed, input_shape=shapes, weights=weights, perturb=perturb
            )
        facts: dict[str, Any] = {
            "client": str(result.client),
            "server": str(result.server),
            "digest": result.digest,
            "parameters_client": result.manifest.parameters,
            "frozen_client": result.manifest.frozen,
            "parameters_server": result.server_parameters,
            "activation_shape": result.manifest.activation.shape,
            "parity_max_relative_error": result.manifest.parity_max_relative_error,
        }
        if output == "json":
            print(json.dumps(facts | {"notes": result.notes}))
        else:
            for name, value in facts.items():
                print(f"{name:26} {value}")
            for note in result.notes:
                print(f"note: {note}")


def _export_run(run: Path, out: Path | None, output: str) -> None:
    if out is None:
        fail("export --from-run: needs --out", 2)
    from server_node.trained import export_run

    with redirect_stdout(sys.stderr):
        trained = export_run(run, out)
    facts = {
        name: value if isinstance(value, float) else str(value)
        for name, value in trained._asdict().items()
    }
    if output == "json":
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:26} {value}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Another data set, in a form that data.source takes.")
@format_option
def evaluate(run: Path, data: str | None, output: str) -> None:
    """Score the trained model of a run folder again, on the run's test set or on another.

    Weights come from the journal, checked against its digests; the arithmetic is the run's, so that
    its accuracy is repeated exactly.

    \b
    musplit evaluate runs/digits-20260101-120000
    musplit evaluate runs/digits-20260101-120000 --data other.npz --format json
    """
    with guarded():
        from server_node.trained import evaluate_run

        with redirect_stdout(sys.stderr):
            facts = evaluate_run(run, data)
    if output == "json":
        print(json.dumps(facts))
        return
    for name in ("accuracy", "loss", "samples", "data", "rounds"):
        print(f"{name:22} {facts[name]}")
    if facts["accuracy_of_summary"] is not None:
        same = facts["accuracy_of_summary"] == facts["accuracy"]
        print(f"{'summary.json says':22} {'the same' if same else facts['accuracy_of_summary']}")
    for note in facts["notes"]:
        say(f"note: {note}")


def _print_cuts(model: str, seed: int, shapes: tuple[str, ...], output: str) -> None:
    from export.listing import as_json, list_cuts, table
    from export.models import build_model

    with redirect_stdout(sys.stderr):
        cuts = list_cuts(build_model(model, seed, shapes))
    print(json.dumps(as_json(cuts)) if output == "json" else table(cuts))
