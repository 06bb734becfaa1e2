"""`musplit stem`: a data-driven device half, fitted without pooling private samples."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from musplit.support import format_option, guarded, print_facts, say, set_option

_FOLDER = click.Path(path_type=Path)


@click.group()
def stem() -> None:
    """Fit the zoo's stem:D from public samples and from sums over the devices.

    Three steps: filters at the server, from public samples or from chance; stats on each device,
    which gives away sums and no sample; fit at the server. The result is for model.weights.

    \b
    musplit stem filters CONFIG --out stem
    musplit stem stats --bundle stem/client --data shard-000.npz --out stats-000.npz
    musplit stem fit --filters stem --out stem.safetensors stats-*.npz
    """


@stem.command()
@click.argument("config", type=_FOLDER)
@click.option("--random", "at_random", is_flag=True,
              help="Random directions instead of public patches: no public samples needed."
              )  # fmt: skip
@set_option
@click.option("--out", required=True, type=_FOLDER, help="Folder to write.")
@format_option
def filters(
    config: Path, at_random: bool, overrides: tuple[str, ...], out: Path, output: str
) -> None:  # fmt: skip
    """Draw the filters; OUT/client is the bundle that devices need for stats.

    CONFIG is a run's configuration whose model.name is stem:D. The filters are whitened patches of
    the public samples (data.public, data.public_source), or random directions.

    \b
    musplit stem filters run.toml --set data.public=2000 --out stem
    musplit stem filters run.toml --random --out stem
    """
    with guarded():
        from server_node.config import load_config
        from server_node.stem import write_filters

        with redirect_stdout(sys.stderr):
            written = write_filters(load_config(config, list(overrides)), out, at_random=at_random)
    facts = {
        "filters": str(written.filters), "bundle": str(written.bundle),
        "features": written.features, "public_samples": written.public_samples,
    }  # fmt: skip
    print_facts(facts, output)


@stem.command()
@click.option("--bundle", required=True, type=_FOLDER, help="OUT/client of stem filters.")
@click.option("--data", required=True, type=_FOLDER, help="The device's shard, an npz file.")
@click.option("--threads", default=1, type=click.IntRange(1), show_default=True,
              help="Threads of ONNX Runtime.")  # fmt: skip
@click.option("--out", required=True, type=_FOLDER, help="File to write.")
@format_option
def stats(bundle: Path, data: Path, threads: int, out: Path, output: str) -> None:
    """Sum a shard's features on its device: forward passes only, no torch.

    What leaves the device is OUT: the number of samples, the sum of their features, and the sum of
    the features' products: about 2 n^2 bytes for n features (8.4 MB for 2,048), whatever the
    number of samples. No sample is in it, but it is no proof of privacy: of one sample the sum is
    its features, of few samples it tells much, and which features vary together is told always.
    Nothing is added to hide it; send it over a link that you trust.

    \b
    musplit stem stats --bundle stem/client --data shard-000.npz --out stats-000.npz
    """
    with guarded():
        from edge_client.bundle import read_bundle
        from edge_client.shard import load_shard
        from edge_client.stem_stats import shard_moments
        from wire_protocol.moments import save_moments

        shard = load_shard(data)
        with click.progressbar(length=shard.samples, label="samples", file=sys.stderr) as bar:
            done = 0

            def show(samples: int) -> None:
                nonlocal done
                bar.update(samples - done)
                done = samples

            moments = shard_moments(read_bundle(bundle), shard, threads, show)
        size_bytes = save_moments(moments, out)
    facts = {
        "stats": str(out), "samples": moments.samples, "features": len(moments.total),
        "bytes": size_bytes,
    }  # fmt: skip
    print_facts(facts, output)


@stem.command()
@click.argument("stats", nargs=-1, required=True, type=_FOLDER)
@click.option("--filters", "folder", required=True, type=_FOLDER, help="OUT of stem filters.")
@click.option("--dim", type=click.IntRange(1), help="Features to keep.  [default: the model's D]")
@click.option("--out", required=True, type=_FOLDER, help="Safetensors file to write.")
@format_option
def fit(
    stats: tuple[Path, ...], folder: Path, dim: int | None, out: Path, output: str
) -> None:  # fmt: skip
    """Add the devices' sums, whiten by their covariance, write start weights for model.weights.

    \b
    musplit stem fit --filters stem --out stem.safetensors stats-*.npz
    musplit emulate run.toml --set model.weights=stem.safetensors --set model.perturb='["none"]'
    """
    with guarded():
        from server_node.stem import write_stem
        from wire_protocol.moments import load_moments

        say(f"adding the sums of {len(stats)} devices")
        model = write_stem(folder, map(load_moments, stats), dim, out)
    print_facts({"weights": str(out), "model": model}, output)
