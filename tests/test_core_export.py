"""Exported halves: named inputs instead of folded weights, parity, folders that stand alone."""

import json

import numpy as np
import onnx
import pytest
import torch

from edge_client.bundle import read_bundle
from edge_client.session import ClientSession
from export import exporter
from export.cuts import cut_model
from export.errors import HalfError, ParityError
from export.exporter import export_model, load_halves
from export.graph import MAX_RELATIVE_ERROR, check_parity, export_graph
from export.models import BuiltModel, build_model
from export.server_half import ModelInput, read_server_half
from wire_protocol.manifest import InputSpec

OWN_MODEL = """
from collections import OrderedDict
from torch import nn

def make():
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    for layer in (body[1], head[2]):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return nn.Sequential(OrderedDict(body=body, head=head))
"""


class Case:
    """One exported model, with torch's halves of the same name and seed beside it."""

    def __init__(self, name, cut, shape, folder):
        self.export = export_model(name, cut, folder, seed=3, input_shape=shape)
        self.folder, self.shape = folder, shape
        self.halves = cut_model(build_model(name, 3, shape), cut)
        self.bundle = read_bundle(self.export.client)
        self.graph = onnx.load_from_string(self.bundle.graph).graph

    def session(self, batch):
        return ClientSession(self.bundle, batch, threads=1)

    def samples(self, batch, seed=0):
        random = np.random.default_rng(seed)
        return random.standard_normal((batch, *self.shape)).astype(np.float32)


@pytest.fixture(scope="module", params=["mlp", "lenet", "own"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model.py").write_text(OWN_MODEL)
    name, cut, shape = {
        "mlp": ("mlp:12-9-7-5", "fc2", (12,)),
        "lenet": ("lenet", "conv2", (1, 28, 28)),
        "own": (f"{folder}/model.py:make", "body", (3, 6, 6)),
    }[request.param]
    return Case(name, cut, shape, folder)


def test_every_parameter_and_buffer_is_a_graph_input_with_torchs_name(case):
    client = case.halves.client
    expected = [*client.parameter_names.values(), *client.buffer_names.values(), "input"]
    assert sorted(value.name for value in case.graph.input) == sorted(expected)
    assert [t.name for t in case.bundle.manifest.tensors] == expected[:-1]
    kinds = [t.kind for t in case.bundle.manifest.tensors]
    assert kinds.count("parameter") == len(client.parameter_names)
    assert kinds.count("buffer") == len(client.buffer_names)


def test_no_weights_stay_behind_in_the_graph(case):
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    held = [t for t in case.graph.initializer if t.data_type in floats]
    held += [
        attribute.t
        for node in case.graph.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in floats
    ]
    assert [t.name for t in held if np.prod(t.dims) > 1] == []


def test_weights_file_holds_parameters_then_buffers_as_torch_has_them(case):
    module = case.halves.client.module
    expected = [*module.parameters(), *module.buffers()]
    weights = (case.bundle.folder / "weights.bin").read_bytes()
    assert weights == b"".join(t.detach().numpy().tobytes() for t in expected)
    parameters = torch.nn.utils.parameters_to_vector(module.parameters()).detach().numpy()
    assert case.bundle.initial_parameters().tobytes() == parameters.tobytes()


def test_manifest_says_what_crosses_the_cut_and_how_exact_the_graph_is(case):
    manifest = json.loads((case.export.client / "manifest.json").read_text())
    assert 0 <= manifest["parity_max_relative_error"] <= MAX_RELATIVE_ERROR == 1e-5
    with torch.no_grad():
        h = case.halves.client.module(torch.zeros(1, *case.shape))
        logits = case.halves.server.module(h)
    assert manifest["activation"]["shape"] == list(h.shape[1:])
    assert manifest["classes"] == logits.shape[1]
    assert manifest["inputs"][0]["shape"] == list(case.shape)


@pytest.mark.parametrize("batch", [1, 7])
def test_session_computes_what_torch_computes(case, batch):
    x = case.samples(batch)
    with torch.no_grad():
        want = case.halves.client.module(torch.from_numpy(x)).numpy()
    got = case.session(batch).forward([x])
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_changing_the_parameters_changes_the_next_forward_without_rebinding(case):
    session, x = case.session(4), case.samples(4)
    before = session.forward([x]).copy()
    initial = session.parameters.copy()
    noise = 0.05 * np.random.default_rng(1).standard_normal(initial.shape)
    session.parameters += noise.astype(np.float32)
    offset = 0
    state = dict(case.halves.client.module.named_buffers())
    for name, parameter in case.halves.client.module.named_parameters():
        part = session.parameters[offset : offset + parameter.numel()]
        state[name] = torch.from_numpy(part.copy()).view(parameter.shape)
        offset += parameter.numel()
    with torch.no_grad():
        want = torch.func.functional_call(
            case.halves.client.module, state, (torch.from_numpy(x),)
        ).numpy()
    after = session.forward([x]).copy()
    np.testing.assert_allclose(after, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(after - before).max() > 1e-2 * np.abs(before).max()
    session.parameters[...] = initial
    assert session.forward([x]).tobytes() == before.tobytes()


def test_the_same_seed_exports_the_same_bytes(case, tmp_path):
    manifest = case.export.manifest
    again = export_model(manifest.model, manifest.cut, tmp_path, seed=3, input_shape=case.shape)
    assert again.digest == case.export.digest


def test_export_leaves_torchs_generator_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(4)
    torch.manual_seed(5)
    export_model("mlp:4-3-2", "fc1", tmp_path, seed=0)
    assert torch.equal(torch.rand(4), want)


# -- the server half


def test_server_folder_alone_rebuilds_both_halves(case, tmp_path):
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for path in case.export.server.iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    source = case.folder / "model.py"
    hidden = source.rename(tmp_path / "hidden.py")
    try:
        halves = load_halves(alone)
    finally:
        hidden.rename(source)
    for half in ("client", "server"):
        want = getattr(case.halves, half).module.state_dict()
        got = getattr(halves, half).module.state_dict()
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_flat_server_weights_are_torchs_parameters_in_order(case):
    manifest, weights = read_server_half(case.export.server)
    want = torch.nn.utils.parameters_to_vector(case.halves.server.module.parameters())
    assert weights.tobytes() == want.detach().numpy().tobytes()
    assert manifest.parameters == case.export.server_parameters == len(want)


def test_client_folder_holds_no_server_weights(case):
    names = sorted(path.name for path in case.export.client.iterdir())
    assert names == ["client.onnx", "manifest.json", "weights.bin"]
    data = b"".join(path.read_bytes() for path in case.export.client.iterdir())
    for name, parameter in case.halves.server.module.named_parameters():
        if parameter.unique().numel() > 1:
            assert parameter.detach().numpy().tobytes()[:32] not in data, name
    for name in case.halves.server.parameter_names.values():
        assert name.encode() not in data


@pytest.mark.parametrize("change", ["cut", "altered", "missing"])
def test_damage_to_any_file_of_the_server_half_is_told_in_one_line(case, tmp_path, change):
    names = sorted(path.name for path in case.export.server.iterdir())
    assert ("model.py" in names) == (case.export.manifest.cut == "body")
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        for other in names:
            (folder / other).write_bytes((case.export.server / other).read_bytes())
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if change == "cut":
            (folder / name).write_bytes(data[: len(data) // 2])
        elif change == "altered":
            (folder / name).write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(HalfError, match=name) as caught:
            read_server_half(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parameters", [0, -1, 10**6, 1 << 70, 1.5, "12"])
def test_server_manifest_with_an_impossible_size_is_refused(tmp_path, parameters):
    export_model("mlp:4-3-2", "fc1", tmp_path, seed=0)
    path = tmp_path / "server" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"parameters": parameters}
    path.write_text(json.dumps(manifest))
    with pytest.raises(HalfError):
        read_server_half(tmp_path / "server")


# -- a graph that lies


def test_graph_of_other_arithmetic_is_a_parity_error():
    def half(activation):
        layers = (torch.nn.Linear(4, 6), activation, torch.nn.Linear(6, 2))
        model = BuiltModel("m", torch.nn.Sequential(*layers), (ModelInput((4,), "float32"),))
        return cut_model(model, "1").client

    inputs = [InputSpec("input", [4], [4], "float32")]
    graph = export_graph(half(torch.nn.ReLU()), inputs)
    assert check_parity(graph, half(torch.nn.ReLU()), inputs, seed=0) <= MAX_RELATIVE_ERROR
    with pytest.raises(ParityError, match="differs from torch") as caught:
        check_parity(graph, half(torch.nn.GELU()), inputs, seed=0)
    assert "\n" not in str(caught.value)


def test_export_whose_graph_lies_writes_no_bundle(tmp_path, monkeypatch):
    def lie(half, inputs):
        model = onnx.load_from_string(export_graph(half, inputs))
        (relu,) = [node for node in model.graph.node if node.op_type == "Relu"]
        relu.op_type = "Tanh"
        return model.SerializeToString()

    monkeypatch.setattr(exporter, "export_graph", lie)
    with pytest.raises(ParityError):
        export_model("mlp:4-3-2", "fc1", tmp_path, seed=0)
    assert list(tmp_path.rglob("*.*")) == []
