"""Public samples, shifted devices, and the warm-up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_client.shard import load_shard
from emulation.inprocess import make_shards
from export.models import build_model
from export.start_weights import load_start_weights
from server_node.config import load_config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError, DataError
from server_node.partition import write_shards
from server_node.prepare import prepare
from server_node.sections import DataSection
from server_node.transform import sample_arrays
from server_node.warmup import Warmup, warm_up
from tests.core_support import tiny_config


def numbered(path: Path, samples: int = 60, shape: tuple[int, ...] = (4, 4)) -> Path:
    """Images whose first pixel is their number."""
    random = np.random.default_rng(samples)
    arrays = {}
    for split in ("train", "test"):
        x = random.integers(0, 200, (samples, *shape)).astype(np.uint8)
        x.reshape(samples, -1)[:, 0] = np.arange(samples)
        arrays |= {f"x_{split}": x, f"y_{split}": np.arange(samples) % 3}
    np.savez(path, **arrays)
    return path


def test_public_samples_are_withheld_from_every_shard(tmp_path: Path) -> None:
    source = numbered(tmp_path / "data.npz")
    config = load_config(None, [f"data.source={source}", "data.public=20", "devices.count=4"])
    data = load_dataset(config.data)
    public = set(data.x_public[0][:, 0, 0].tolist())
    assert len(public) == 20
    seen: set[int] = set()
    for path in write_shards(data, 4, 0.0, 0, tmp_path / "shards"):
        with np.load(path) as shard:
            seen |= set(shard["x"][:, 0, 0].tolist())
    assert seen.isdisjoint(public)
    assert seen | public == set(range(60))
    assert sum(shard.samples for shard in make_shards(config)) == 40
    assert any("public: 20 of 60" in note for note in data.notes)
    again = load_dataset(config.data)
    assert np.array_equal(again.x_public[0], data.x_public[0])
    with pytest.raises(DataError, match="leaves none"):
        load_dataset(DataSection(source=str(source), public=60))


def test_the_server_standardises_by_what_it_may_know(tmp_path: Path) -> None:
    section = DataSection(source=str(numbered(tmp_path / "data.npz")), public=20)
    data = load_dataset(section)
    (array,) = sample_arrays(section, data)
    assert array.transform.mean == pytest.approx([data.x_public[0].mean()])


def test_public_samples_of_another_source(tmp_path: Path) -> None:
    source, other = numbered(tmp_path / "a.npz"), numbered(tmp_path / "b.npz", 30)
    section = DataSection(source=str(source), public=10, public_source=str(other))
    data = load_dataset(section)
    assert (len(data.y_train), len(data.y_public)) == (60, 10)
    wrong = numbered(tmp_path / "c.npz", 30, (5, 5))
    with pytest.raises(DataError, match=r"data\.public_source"):
        load_dataset(DataSection(source=str(source), public_source=str(wrong)))


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (4, 4, 3)])
def test_shifts(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = str(numbered(tmp_path / "data.npz", shape=shape))
    last = shape[-1] == 3
    plain = load_dataset(DataSection(source=source, public=20, channels_last=last))
    xs = {}
    for kind in ("rotate90", "invert", "gain"):
        section = DataSection(source=source, public=20, channels_last=last, shift=kind)
        data = load_dataset(section)
        assert np.array_equal(data.x_public[0], plain.x_public[0])
        assert not np.array_equal(data.x_test[0], plain.x_test[0])
        assert any(kind in note for note in data.notes)
        xs[kind] = data.x_train[0]
    x = plain.x_train[0]
    axes = (1, 2) if last or len(shape) == 2 else (2, 3)
    assert np.array_equal(np.rot90(xs["rotate90"], -1, axes), x)
    assert xs["invert"].dtype == np.uint8
    assert np.array_equal(xs["invert"].astype(int) + x, np.full(x.shape, int(x.max()) + x.min()))
    moved = x > 0
    gains = xs["gain"][moved] / x[moved]
    assert gains.min() > 0
    assert len(np.unique(gains.round(3))) > 3


def test_only_square_images_are_rotated(tmp_path: Path) -> None:
    source = str(numbered(tmp_path / "data.npz", shape=(4, 6)))
    with pytest.raises(DataError, match="equal sides"):
        load_dataset(DataSection(source=source, shift="rotate90"))


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (4, 6, 3)])
def test_a_device_holds_its_images_mirrored_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = str(numbered(tmp_path / "data.npz", shape=shape))
    last = shape[-1] == 3
    columns = 2 if last or len(shape) == 2 else 3
    plain, both = (
        load_dataset(DataSection(source=source, channels_last=last, mirror=mirror))
        for mirror in (False, True)
    )
    for mine, old in zip(
        write_shards(both, 4, 0.0, 0, tmp_path / "both"),
        write_shards(plain, 4, 0.0, 0, tmp_path / "plain"),
        strict=True,
    ):
        held, found = load_shard(old), load_shard(mine)
        x = held.xs[0]
        assert np.array_equal(found.xs[0], np.concatenate([x, np.flip(x, columns)]))
        assert np.array_equal(found.y, np.concatenate([held.y, held.y]))
    assert np.array_equal(both.x_test[0], plain.x_test[0])


def test_only_images_are_mirrored(tmp_path: Path) -> None:
    source = str(numbered(tmp_path / "data.npz", shape=(6,)))
    with pytest.raises(DataError, match=r"data\.mirror needs images"):
        load_dataset(DataSection(source=source, mirror=True))


def test_a_warm_up_starts_a_run(tmp_path: Path) -> None:
    config = tiny_config("data.public=400")

    def warm(name: str, *overrides: str) -> Warmup:
        return warm_up(
            tiny_config("data.public=400", *overrides), tmp_path / name, epochs=8, steps=None,
            eta=5e-3, batch=32, notify=lambda _done, _all: None,
        )  # fmt: skip

    result = warm("a.safetensors")
    assert result.steps == 8 * 13
    before, after = result.test_accuracy
    assert before < 0.4
    assert after > 0.8
    assert warm("b.safetensors").weights.read_bytes() == result.weights.read_bytes()
    shifted = warm("c.safetensors", "data.shift=invert")
    assert shifted.weights.read_bytes() == result.weights.read_bytes()
    assert shifted.test_accuracy[1] < result.test_accuracy[1] - 0.3
    model = build_model(config.model.name, 0, [64])
    assert load_start_weights(model, result.weights)
    started = tiny_config("data.public=400", f"model.weights={result.weights}")
    experiment = prepare(started, tmp_path / "run")
    assert np.array_equal(
        experiment.client.initial_parameters()[: 64 * 12],
        model.module.get_parameter("fc1.0.weight").detach().numpy().ravel(),
    )


def test_a_warm_up_needs_public_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.public"):
        warm_up(tiny_config(), tmp_path / "w", epochs=1, steps=1, eta=1e-3, batch=8,
                notify=lambda _done, _all: None)  # fmt: skip
