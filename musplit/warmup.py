"""`musplit warmup`: start weights from public samples, by first-order training at the server."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from musplit.support import FiniteRange, format_option, guarded, set_option


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--epochs", default=5, type=click.IntRange(1), show_default=True,
              help="Passes over the public samples.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Instead of --epochs: steps of Adam.")
@click.option("--eta", default=1e-3, type=FiniteRange(0, min_open=True), show_default=True,
              help="Adam's step size.")  # fmt: skip
@click.option("--batch", default=64, type=click.IntRange(1), show_default=True,
              help="Samples a step.")  # fmt: skip
@set_option
@click.option("--out", required=True, type=click.Path(path_type=Path),
              help="Safetensors file to write.")  # fmt: skip
@format_option
def warmup(
    config: Path, epochs: int, steps: int | None, eta: float, batch: int,
    overrides: tuple[str, ...], out: Path, output: str,
) -> None:  # fmt: skip
    """Train the whole model on public samples, by backpropagation at the server.

    CONFIG is a run's configuration with data.public or data.public_source. OUT is for
    model.weights. Prints the accuracy before and after, on the public samples and on the test set;
    with data.shift the test set is shifted, the public samples are not. Seeded by run.seed.

    \b
    musplit warmup run.toml --set data.public=5000 --epochs 10 --out start.safetensors
    musplit emulate run.toml --set data.public=5000 --set model.weights=start.safetensors
    """
    with guarded():
        from server_node.config import load_config
        from server_node.warmup import warm_up

        checked = load_config(config, list(overrides))
        with redirect_stdout(sys.stderr), click.progressbar(
            length=1, label="training", file=sys.stderr
        ) as bar:  # fmt: skip

            def show(_done: int, planned: int) -> None:
                bar.length = planned
                bar.update(1)

            result = warm_up(
                checked, out, epochs=epochs, steps=steps, eta=eta, batch=batch, notify=show
            )
    if output == "json":
        print(json.dumps(result._asdict() | {"weights": str(result.weights)}))
        return
    print(f"{'weights':18} {result.weights}")
    print(f"{'public samples':18} {result.public_samples}, {result.steps} steps")
    for name, (before, after) in {
        "public accuracy": result.public_accuracy, "test accuracy": result.test_accuracy,
    }.items():  # fmt: skip
        print(f"{name:18} {before:.4f} -> {after:.4f}")
