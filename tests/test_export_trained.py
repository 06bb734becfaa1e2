"""A user's own model from its file to the trained model: export, train, and out of the kit."""

import json
import random

import numpy as np
import onnxruntime as ort
import pytest
import torch
from core_support import play, tiny_config
from own_models import SHAPES, write_data, write_model
from safetensors.torch import load_file, save, save_file

from edge_client.bundle import read_bundle
from edge_client.errors import ShardError
from edge_client.session import ClientSession
from edge_client.shard import check_shard, load_shard
from export.client_half import read_client_half
from export.errors import ModelError
from export.exporter import export_model, load_halves
from export.inputs import SampleArray
from export.models import build_model
from export.server_half import read_server_half
from export.trained import RawModel, export_trained, whole_state
from server_node.config import DataSection
from server_node.datasets import load_dataset
from server_node.errors import DataError
from server_node.evaluation import Evaluator
from server_node.prepare import prepare
from wire_protocol.manifest import (
    InputSpec,
    Transform,
    misfit,
    prepare_input,
    prepare_inputs,
    sha256,
)

CUTS = {"shared": "drop@1", "batchnorm": "body.2", "embedding": "block", "two": "both"}


class Trained:
    """A kind of model after three rounds on its own data, by configuration alone."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.data = write_data(folder, kind)
        self.source = write_model(folder, kind)
        config = tiny_config(
            f"model.name={self.source}", f"model.cut={CUTS[kind]}", f"data.source={self.data}"
        )
        self.experiment = prepare(config, folder / "run")
        self.run = play(self.experiment, folder / "played")
        self.bundle = read_client_half(folder / "run" / "client")
        self.server = folder / "run" / "server"
        self.out = export_trained(
            self.server, self.bundle, self.run.client, self.run.server, folder / "out"
        )

    def test_set(self):
        arrays = np.load(self.data)
        specs = self.bundle.manifest.inputs
        names = ["x_test", "x_test_1"][: len(specs)]
        return [arrays[name] for name in names], arrays["y_test"], specs


@pytest.fixture(scope="module", params=list(CUTS))
def trained(request, tmp_path_factory):
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


def test_model_is_trained_and_proved_by_changing_the_configuration_only(trained):
    run, manifest = trained.run, trained.bundle.manifest
    assert run.finished.outcome.value == "complete"
    assert manifest.parity_max_relative_error <= 1e-5
    assert [i.dtype for i in manifest.inputs] == [
        "int64" if text.startswith("int:") else "float32" for text in SHAPES[trained.kind]
    ]
    assert np.abs(run.client - trained.bundle.initial_parameters()).max() > 1e-5
    assert np.abs(run.server - trained.experiment.server_weights).max() > 1e-5


def test_the_devices_graph_computes_the_client_half(trained):
    xs, _, specs = trained.test_set()
    prepared = prepare_inputs([x[:5] for x in xs], specs)
    session = ClientSession(read_bundle(trained.folder / "run" / "client"), 5, threads=1)
    halves = load_halves(trained.server)
    want = load_file(trained.out.state)
    state = {own: want[name] for own, name in halves.client.parameter_names.items()}
    session.parameters[...] = trained.run.client
    # load_halves fills the server's buffers; a client's come from the factory's seed.
    with torch.no_grad():
        h = torch.func.functional_call(
            halves.client.module, state, tuple(torch.from_numpy(x) for x in prepared)
        ).numpy()
    np.testing.assert_allclose(session.forward(prepared), h, rtol=0, atol=1e-5 * np.abs(h).max())


def test_one_onnx_file_takes_raw_samples_and_gives_the_runs_accuracy(trained):
    result = trained.out
    names = sorted(path.name for path in result.onnx.parent.iterdir())
    assert names == ["model.json", "model.onnx", "model.safetensors"]
    assert result.max_relative_error <= 1e-5
    session = ort.InferenceSession(result.onnx.read_bytes(), providers=["CPUExecutionProvider"])
    xs, y, specs = trained.test_set()
    feeds = {s.name: x.astype(s.dtype) for s, x in zip(specs, xs, strict=True)}
    (logits,) = session.run(["logits"], feeds)
    assert (logits.argmax(1) == y).mean() == trained.run.scores.accuracy
    facts = json.loads(result.facts.read_text())
    assert facts["classes"] == 3
    assert [i["raw_shape"] for i in facts["inputs"]] == [list(x.shape[1:]) for x in xs]


def test_safetensors_hold_the_trained_model_under_its_own_names(trained):
    tensors = load_file(trained.out.state)
    model = build_model(trained.source, 99, SHAPES[trained.kind]).module
    model.load_state_dict(tensors)
    xs, y, specs = trained.test_set()
    prepared = (torch.from_numpy(x) for x in prepare_inputs(xs, specs))
    with torch.no_grad():
        right = model(*prepared).argmax(1).numpy() == y
    assert right.mean() == trained.run.scores.accuracy


def test_another_run_may_start_from_the_trained_weights(tmp_path):
    source = write_model(tmp_path, "batchnorm")
    tensors = {
        name: t + 1 if t.is_floating_point() else t
        for name, t in build_model(source, 5, ["1,6,6"]).module.state_dict().items()
    }
    save_file(tensors, tmp_path / "w.safetensors")
    export = export_model(
        source, "body.2", tmp_path, seed=0, input_shape=["1,6,6"],
        weights=tmp_path / "w.safetensors",
    )  # fmt: skip
    bundle, (manifest, server) = read_client_half(export.client), read_server_half(export.server)
    assert manifest.start_weights_sha256 == sha256((tmp_path / "w.safetensors").read_bytes())
    state = whole_state(export.server, bundle, bundle.initial_parameters(), server)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_order_of_arrival_does_not_matter_to_a_traced_half(trained, tmp_path):
    again = play(trained.experiment, tmp_path / "shuffled", random.Random(1))
    assert again.client.tobytes() == trained.run.client.tobytes()
    assert again.server.tobytes() == trained.run.server.tobytes()


# -- transforms in the graph


@pytest.mark.parametrize(
    ("raw", "transform"),
    [
        ((6, 6), Transform(scale=1 / 255, mean=[0.3], std=[0.2])),
        ((12, 12), Transform(pool=2, mean=[float(i) for i in range(36)], std=[2.0] * 36)),
        ((6, 6, 1), Transform(channels_last=True, scale=2.0)),
        ((12, 12, 1), Transform(channels_last=True, pool=2)),
        ((36,), Transform()),
    ],
)
def test_declared_transform_is_the_same_in_the_whole_model(raw, transform):
    spec = InputSpec("input", list(raw), [1, 6, 6], "float32", transform)
    x = np.random.default_rng(0).integers(0, 255, (4, *raw), dtype=np.uint8)
    got = RawModel(torch.nn.Identity(), [spec])(torch.from_numpy(x.astype(np.float32))).numpy()
    want = prepare_input(x, spec)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


# -- data that does not fit


def test_tokens_outside_the_table_are_refused_at_the_edge(tmp_path):
    export = export_model(
        write_model(tmp_path, "embedding"), "embedding", tmp_path, seed=0, input_shape=["int:5"]
    )
    manifest = export.manifest
    assert manifest.inputs[0].limit == 20
    data = load_dataset(DataSection(source=str(write_data(tmp_path, "embedding"))))
    assert misfit(manifest, data.x_train) == ""
    for bad in (-1, 20):
        data.x_test[0][7, 2] = bad
        assert "0 .. 19" in misfit(manifest, data.x_test)
        np.savez(tmp_path / "shard.npz", x=data.x_test[0], y=data.y_test)
        with pytest.raises(ShardError, match=r"model .* takes integers in 0 \.\. 19"):
            check_shard(load_shard(tmp_path / "shard.npz"), manifest)
        with pytest.raises(DataError, match=r"integers in 0 \.\. 19"):
            Evaluator(export.halves.client, manifest, data)


def test_data_of_another_shape_is_refused_with_the_option_to_give(tmp_path):
    source, arrays = write_model(tmp_path, "flatten"), [SampleArray((6, 6))]
    with pytest.raises(ModelError, match=r"--set 'model\.input_shape=\[1,6,6\]'"):
        build_model(source, 0, [], arrays)
    assert build_model(source, 0, [1, 6, 6], arrays).inputs[0].shape == (1, 6, 6)
    with pytest.raises(ModelError, match="not as many numbers"):
        build_model(source, 0, [1, 5, 5], arrays)
    with pytest.raises(ModelError, match="for 2 inputs, a sample of the data has 1"):
        build_model(source, 0, ["3", "4"], arrays)
    with pytest.raises(ModelError, match="the data holds floats"):
        build_model(source, 0, ["int:36"], arrays)


# -- start weights


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("head.bias"), "lacks tensor head.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is none of"),
        (lambda t: t.update({"head.bias": torch.zeros(4)}), r"head\.bias has shape \(4,\)"),
        (lambda t: t.update({"head.bias": torch.zeros(3).half()}), "head.bias is torch.float16"),
        (lambda t: t.update({"head.bias": torch.tensor([1, torch.nan, 2])}), "not finite"),
    ],
)
def test_start_weights_that_do_not_fit_name_their_tensor(tmp_path, change, says):
    source = write_model(tmp_path, "shared")
    tensors = build_model(source, 0, ["8"]).module.state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=says) as caught:
        export_model(
            source, "first", tmp_path, seed=0, input_shape=["8"],
            weights=tmp_path / "w.safetensors",
        )  # fmt: skip
    assert "w.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "header"])
def test_damaged_start_weights_are_one_error(tmp_path, damage):
    data = save({"first.weight": torch.zeros(6, 8)})
    path = tmp_path / "w.safetensors"
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-5], "header": b"\xff" * 40}[damage])
    with pytest.raises(ModelError, match=r"w\.safetensors"):
        export_model("mlp:4-3-2", "fc1", tmp_path, seed=0, weights=path)
