"""The declared transform: fitted on what the device computes, carried by the bundle, explained."""

import textwrap

import numpy as np
import pytest
from core_support import play, tiny_config

from edge_client.shard import check_shard
from emulation.inprocess import make_shards
from server_node.config import DataSection
from server_node.errors import ConfigError, DataError
from server_node.prepare import prepare
from server_node.transform import check_fit, declare
from wire_protocol.errors import InputError
from wire_protocol.manifest import InputSpec, Transform, prepare_input

RANDOM = np.random.default_rng(0)


def declared(x, **fields):
    return declare(DataSection(**fields), [x], ["float32"])[0]


def prepared(x, **fields):
    one = declared(x, **fields)
    spec = InputSpec("x", list(one.raw_shape), list(one.shape), "float32", one.transform)
    return prepare_input(x, spec)


@pytest.mark.parametrize(
    ("sample", "fields", "raw", "shape"),
    [
        ((28, 28), {"pool": 2}, (28, 28), (14, 14)),
        ((28, 28, 1), {"pool": 2}, (1, 28, 28), (1, 14, 14)),
        ((28, 28, 1), {"pool": 2, "channels_last": True}, (28, 28, 1), (1, 14, 14)),
        ((32, 32, 3), {"channels_last": True}, (32, 32, 3), (3, 32, 32)),
        ((32, 16, 3), {"channels_last": True, "pool": 4}, (32, 16, 3), (3, 8, 4)),
        ((3, 32, 32), {"pool": 8}, (3, 32, 32), (3, 4, 4)),
        ((100, 6), {"channels_last": True}, (100, 6), (6, 100)),
        ((64,), {}, (64,), (64,)),
        ((), {}, (1,), (1,)),
    ],
)
@pytest.mark.parametrize("standardise", ["none", "global", "feature"])
def test_shapes_before_and_after(sample, fields, raw, shape, standardise):
    x = RANDOM.integers(0, 256, (7, *sample), np.uint8)
    one = declared(x, standardise=standardise, **fields)
    assert (one.raw_shape, one.shape) == (raw, shape)
    assert prepared(x, standardise=standardise, **fields).shape == (7, *shape)


def test_the_transform_moves_pools_and_scales_in_this_order():
    x = RANDOM.integers(0, 256, (5, 4, 6, 3), np.uint8)
    want = x.transpose(0, 3, 1, 2).reshape(5, 3, 2, 2, 3, 2).mean(axis=(3, 5)) / 4
    got = prepared(x, channels_last=True, pool=2, scale=0.25, standardise="none")
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 1000])
@pytest.mark.parametrize("how", ["global", "feature"])
def test_statistics_are_those_of_pooled_and_scaled_samples_whatever_the_blocks(
    monkeypatch, count, how
):
    monkeypatch.setattr("server_node.transform._BLOCK_ELEMENTS", count)
    x = RANDOM.integers(0, 256, (50, 8, 8), np.uint8)
    got = declared(x, pool=2, scale=0.01, standardise=how).transform
    plain = prepared(x, pool=2, scale=0.01, standardise="none").astype(np.float64)
    flat, axis = plain.reshape(50, -1), 0 if how == "feature" else None
    np.testing.assert_allclose(got.mean, np.atleast_1d(flat.mean(axis=axis)), rtol=1e-6)
    np.testing.assert_allclose(got.std, np.atleast_1d(flat.std(axis=axis)), rtol=1e-6)


@pytest.mark.parametrize("spread", [1e-3, 1e-44])
def test_large_offsets_and_tiny_spreads_stay_finite(spread):
    x = np.array([[0.0], [spread]], np.float32)
    assert np.isfinite(prepared(x)).all()
    far = np.array([[1e6], [1e6 + 1]], np.float64)
    np.testing.assert_allclose(prepared(far), [[-1], [1]])


def test_integer_inputs_and_further_inputs_have_their_own_rule():
    tokens, image = np.arange(12).reshape(4, 3), RANDOM.normal(5, 2, (4, 8, 8))
    side = RANDOM.normal(100, 3, (4, 2)).astype(np.float32)
    section = DataSection(pool=2, scale=0.5)
    first, second, third = declare(section, [image, tokens, side], ["float32", "int64", "float32"])
    assert (first.shape, first.transform.pool) == ((4, 4), 2)
    assert (second.shape, second.transform) == ((3,), Transform())
    assert (third.shape, third.transform.pool, third.transform.scale) == ((2,), 1, 1.0)
    assert third.transform.mean == pytest.approx([side.mean()])


@pytest.mark.parametrize(
    ("sample", "fields", "says"),
    [
        ((28, 28), {"pool": 3}, ["data.pool", "3 does not divide 28x28"]),
        ((32, 32, 3), {"pool": 2}, ["data.pool", "set data.channels_last = true"]),
        ((64,), {"pool": 2}, ["data.pool", "no images"]),
        ((100, 6), {"pool": 2, "channels_last": True}, ["data.pool", "no images"]),
        ((64,), {"channels_last": True}, ["data.channels_last"]),
        ((1, 1, 1, 1, 1, 2), {}, ["6 dimensions"]),
        ((600, 600), {"standardise": "feature"}, ["data.standardise", "use 'global'"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_field(sample, fields, says):
    with pytest.raises((ConfigError, DataError)) as caught:
        declared(np.zeros((2, *sample), np.uint8), **fields)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_values_that_float32_does_not_hold_after_scaling_are_refused():
    with pytest.raises(DataError, match="too large for float32"):
        declared(np.array([[1.0], [3e38]]), scale=1e6)


# -- in a run


def write_colours(path):
    """Twelve 8x8x3 images of two classes, train and test."""
    x = RANDOM.integers(0, 256, (24, 8, 8, 3), np.uint8)
    y = np.arange(24) % 2
    np.savez(path, x_train=x[:16], y_train=y[:16], x_test=x[16:], y_test=y[16:],
             classes=np.array(["even", "odd"]))  # fmt: skip
    return path


@pytest.fixture
def colours(tmp_path):
    model = tmp_path / "conv.py"
    model.write_text(
        textwrap.dedent(
            """
            from torch import nn


            def make():
                return nn.Sequential(
                    nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
                )
            """
        )
    )
    data = write_colours(tmp_path / "colours.npz")
    return [f"data.source={data}", f"model.name={model}:make", "model.cut=0", "data.alpha=0"]


def refusal(tmp_path, *overrides):
    with pytest.raises(InputError) as caught:
        prepare(tiny_config(*overrides), tmp_path / "run")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_bundle_carries_the_transform_and_both_sides_compute_the_same(tmp_path, colours):
    config = tiny_config(*colours, "data.channels_last=true", "data.pool=2")
    experiment = prepare(config, tmp_path / "run")
    (spec,) = experiment.exported.manifest.inputs
    assert (spec.raw_shape, spec.shape) == ([8, 8, 3], [3, 4, 4])
    assert (spec.transform.channels_last, spec.transform.pool) == (True, 2)
    assert experiment.class_names == ("even", "odd")
    shards = make_shards(config)
    for shard in shards:
        check_shard(shard, experiment.exported.manifest)
    device = np.concatenate([prepare_input(shard.xs[0], spec) for shard in shards])
    assert abs(device.mean()) < 1e-5
    assert abs(device.std() - 1) < 1e-5
    assert play(experiment, tmp_path / "played").scores is not None


def test_colours_last_for_a_model_that_wants_them_first_is_explained(tmp_path, colours):
    text = refusal(tmp_path, *colours, "data.pool=1")
    assert "if the model wants 3x8x8, set data.channels_last = true" in text


def test_a_declared_input_shape_must_be_what_the_transform_makes(tmp_path, colours):
    text = refusal(tmp_path, *colours, "model.input_shape=[3,4,4]")
    assert "samples of shape (3, 4, 4), the data has (8, 8, 3)" in text
    assert "set data.channels_last = true and data.pool = 2" in text


def test_an_mlp_of_pooled_width_is_told_to_pool(tmp_path):
    x = np.zeros((4, 28, 28), np.uint8)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=np.arange(4) % 2, x_test=x,
             y_test=np.arange(4) % 2)  # fmt: skip
    text = refusal(tmp_path, f"data.source={tmp_path / 'd.npz'}", "model.name=mlp:196-8-2")
    assert text.endswith("; or set data.pool = 2")


@pytest.mark.parametrize(
    ("sample", "wanted", "fits"),
    [
        ((64,), (1, 8, 8), True),
        ((8, 8), (64,), True),
        ((8, 8), (1, 8, 8), True),
        ((8, 8), (4, 16), False),
        ((8, 8, 3), (3, 8, 8), False),
        ((8, 8), (8, 8, 2), False),
    ],
)
def test_dimensions_of_1_do_not_count_and_flat_samples_take_any_shape(sample, wanted, fits):
    one = declared(np.zeros((2, *sample), np.uint8))
    if fits:
        check_fit(tiny_config(), one, wanted)
    else:
        with pytest.raises(ConfigError, match="takes samples of"):
            check_fit(tiny_config(), one, wanted)
