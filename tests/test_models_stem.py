"""The stem: filters, sums on devices without torch, the fit, and runs on top of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edge_client.bundle import read_bundle
from edge_client.shard import load_shard
from edge_client.stem_stats import shard_moments
from emulation.inprocess import InProcessFleet, make_shards
from emulation.stem import fit_stem
from export.errors import ModelError
from export.exporter import export_model
from export.models import build_model
from export.start_weights import load_start_weights
from server_node.config import Config, load_config
from server_node.errors import ConfigError
from server_node.prepare import prepare
from server_node.stem import write_filters, write_stem
from wire_protocol.errors import InputError
from wire_protocol.moments import load_moments, save_moments

# Runs as a board does: torch cannot be imported there.
_STATS = """
import sys
sys.modules["torch"] = None
from musplit.cli import main
main(["stem", "stats", "--bundle", sys.argv[1], "--data", sys.argv[2], "--out", sys.argv[3]])
"""


def stem_config(*overrides: str) -> Config:
    fields = [
        "model.name=stem:12:f8", "model.cut=whiten", "data.public=200", "devices.count=3",
        "devices.batch=8", "run.rounds=2", "method.tau=2", "method.directions_client=2",
    ]  # fmt: skip
    return load_config(None, [*fields, *overrides])


@pytest.mark.parametrize(
    ("shape", "perturb"),
    [
        ([1, 28, 28], ["none"]),
        ([3, 32, 32], ["patches.*"]),
        ([1, 28, 28], ["adapters:2"]),
        ([3, 32, 32], ["norms"]),
    ],
)
def test_every_choice_exports_faithfully(
    shape: list[int], perturb: list[str], tmp_path: Path
) -> None:
    result = export_model(
        "stem:32:f8", "whiten", tmp_path, seed=0, input_shape=shape, perturb=perturb
    )
    assert result.manifest.activation.shape == [32]
    assert result.manifest.parity_max_relative_error <= 1e-5
    assert result.server_parameters == 33 * 10


def test_sums_over_shards_are_those_of_all_samples(tmp_path: Path) -> None:
    config = stem_config()
    bundle = read_bundle(write_filters(config, tmp_path, at_random=False).bundle)
    shards = make_shards(config)
    parts = [shard_moments(bundle, shard) for shard in shards]
    whole = shards[0]._replace(
        xs=[np.concatenate([s.xs[0] for s in shards])], y=np.concatenate([s.y for s in shards])
    )
    want = shard_moments(bundle, whole)
    files = []
    for index, part in enumerate(parts):
        files.append(tmp_path / f"stats-{index}.npz")
        save_moments(part, files[-1])
    total = load_moments(files[0]).join(load_moments(files[1])).join(load_moments(files[2]))
    assert total.samples == want.samples == whole.samples
    np.testing.assert_allclose(total.total, want.total, rtol=1e-9)
    np.testing.assert_allclose(total.second, want.second, rtol=1e-6, atol=1e-6)


def test_the_fit_whitens_and_pools_nothing(tmp_path: Path) -> None:
    config = stem_config()
    weights = fit_stem(config, tmp_path)
    # Without the clamp, the devices' samples come out uncorrelated.
    data = make_shards(config)
    bundle = read_bundle(tmp_path / "client")
    moments = [shard_moments(bundle, shard) for shard in data]
    total = moments[0].join(moments[1]).join(moments[2])
    projection = load_file(weights)
    weight = projection["whiten.project.weight"].astype(np.float64)
    mean = total.total / total.samples
    covariance = total.second / total.samples - np.outer(mean, mean)
    whitened = weight @ covariance @ weight.T
    np.testing.assert_allclose(whitened - np.diag(np.diag(whitened)), 0.0, atol=1e-4)
    assert np.diag(whitened).max() <= 1.0 + 1e-4
    np.testing.assert_allclose(weight @ mean + projection["whiten.project.bias"], 0.0, atol=1e-4)
    assert not load_file(weights)["fc.weight"].any()


def test_stats_on_a_board(tmp_path: Path) -> None:
    config = stem_config()
    bundle = write_filters(config, tmp_path, at_random=True).bundle
    shard = make_shards(config)[1]
    np.savez(tmp_path / "shard.npz", x=shard.xs[0], y=shard.y, shard_index=np.int64(1))
    out = tmp_path / "stats.npz"
    arguments = [str(bundle), str(tmp_path / "shard.npz"), str(out)]
    done = subprocess.run(
        [sys.executable, "-c", _STATS, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    want = shard_moments(read_bundle(bundle), load_shard(tmp_path / "shard.npz"))
    np.testing.assert_allclose(load_moments(out).second, want.second, rtol=1e-6, atol=1e-6)


def test_a_fitted_stem_learns_with_and_without_its_device(tmp_path: Path) -> None:
    weights = fit_stem(stem_config(), tmp_path / "stem")
    for perturb in ('["none"]', '["patches.*"]'):
        config = stem_config(
            f"model.weights={weights}", f"model.perturb={perturb}", "run.rounds=30",
            "method.tau=8", "method.directions_server=8", "method.eta_s=0.1", "method.eta_c=1e-3",
            "evaluation.every=30",
        )  # fmt: skip
        experiment = prepare(config, tmp_path / perturb.strip('[]"*.'))
        run = InProcessFleet(experiment).run()
        assert run.scores is not None
        assert run.scores.accuracy > 0.4


def test_random_filters_need_no_public_samples(tmp_path: Path) -> None:
    config = stem_config("data.public=0")
    with pytest.raises(ConfigError, match=r"data\.public"):
        write_filters(config, tmp_path, at_random=False)
    written = write_filters(config, tmp_path, at_random=True)
    assert (written.public_samples, written.features) == (0, 16)
    model = build_model("stem:12:f8", 0, [1, 8, 8])
    assert load_start_weights(model, written.filters)
    kernels = model.module.get_parameter("patches.filters.weight")
    assert torch.allclose(kernels.sum((1, 2, 3)), torch.zeros(8), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stem", "stem:D"),
        ("stem:0", "stem:D"),
        ("stem:8:x3", "stem:D"),
        ("stem:8:f2:f3", "stem:D"),
        ("stem:999:f8", "only 16 numbers"),
    ],
)
def test_wrong_names(name: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        build_model(name, 0, [1, 8, 8])


def test_sums_that_do_not_fit(tmp_path: Path) -> None:
    config = stem_config()
    bundle = read_bundle(write_filters(config, tmp_path / "a", at_random=True).bundle)
    other = write_filters(stem_config("run.seed=1"), tmp_path / "b", at_random=True)
    moments = shard_moments(bundle, make_shards(config)[0])
    with pytest.raises(InputError, match="different bundles"):
        write_stem(other.bundle.parent, [moments], None, tmp_path / "stem.safetensors")
    with pytest.raises(ModelError, match="cannot be fitted"):
        write_stem(tmp_path / "a", [moments], 17, tmp_path / "stem.safetensors")
    file = tmp_path / "stats.npz"
    save_moments(moments, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="npz"):
        load_moments(file)
    np.savez(file, samples=np.int64(0), total=np.zeros(2), second=np.zeros(3, np.float32),
             bundle_sha256=np.array("x"))  # fmt: skip
    with pytest.raises(InputError, match="holds no moments"):
        load_moments(file)
