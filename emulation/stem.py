"""A stem fitted in one process, by the same steps as on devices: for studies and tests."""

from __future__ import annotations

from pathlib import Path

from edge_client.bundle import read_bundle
from edge_client.stem_stats import shard_moments
from emulation.inprocess import make_shards
from server_node.config import Config
from server_node.stem import write_filters, write_stem


def fit_stem(config: Config, folder: Path, *, at_random: bool = False) -> Path:
    """Filters, sums of every shard of the configuration, projection; returns the start weights.

    The path is for model.weights. Raises InputErrors.
    """
    written = write_filters(config, folder, at_random=at_random)
    bundle = read_bundle(written.bundle)
    # One after the other: the sums of a device are large.
    stats = (shard_moments(bundle, shard) for shard in make_shards(config))
    out = folder / "stem.safetensors"
    write_stem(folder, stats, None, out)
    return out
