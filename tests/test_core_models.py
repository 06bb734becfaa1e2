"""Models and cuts: which are accepted, and what is said, in one line, of those that are not."""

import pytest
import torch
from torch import nn

from export.cuts import cut_model, legal_cuts
from export.errors import CutError, ModelError
from export.exporter import export_model, load_halves
from export.models import BuiltModel, build_model
from export.server_half import ModelInput

HEADER = "import torch\nfrom torch import nn\n"


def own(folder, body, name="model.py"):
    """A model file in `folder`; returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(HEADER + body)
    return folder / name


def built(*layers, shape=(4,)):
    return BuiltModel("own", nn.Sequential(*layers).eval(), (ModelInput(shape, "float32"),))


# -- cuts


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("mlp:8-6-4", ["fc1.0", "fc1"]),
        ("mlp:8-6-5-4", ["fc1.0", "fc1", "fc2.0", "fc2"]),
        ("conv:2-5-4", ["conv1.0", "conv1.1", "conv1", "flatten", "fc1.0", "fc1"]),
        ("lenet", ["conv1.0", "conv1.1", "conv1", "conv2.0", "conv2.1", "conv2", "flatten",
                   "fc1.0", "fc1", "fc2.0", "fc2"]),
    ],
)  # fmt: skip
def test_legal_cuts_are_named_by_the_shortest_name_of_each_position(name, cuts):
    assert legal_cuts(build_model(name, 0, None)) == cuts


@pytest.mark.parametrize("name", ["mlp:8-6-5-4", "conv:2-5-4", "lenet"])
def test_every_legal_cut_gives_halves_that_together_are_the_model(name):
    model = build_model(name, 0, None)
    x = torch.randn(3, *model.inputs[0].shape)
    with torch.no_grad():
        want = model.module(x)
        for cut in legal_cuts(model):
            halves = cut_model(model, cut)
            h = halves.client.module(x)
            assert h.shape[1:] == halves.activation_shape
            assert torch.equal(halves.server.module(h), want)
            names = [*halves.client.parameter_names.values()]
            names += halves.server.parameter_names.values()
            assert names == [name for name, _ in model.module.named_parameters()]


def test_layer_that_is_used_twice_stays_in_both_places():
    """One nn.ReLU() for all layers is how many models are written."""
    relu = nn.ReLU()
    model = built(nn.Linear(4, 6), relu, nn.Linear(6, 6), relu, nn.Linear(6, 3))
    x = torch.randn(16, 4)
    halves = cut_model(model, "1")
    with torch.no_grad():
        assert torch.equal(halves.server.module(halves.client.module(x)), model.module(x))


def test_weights_that_both_halves_would_share_are_refused():
    """Each half steps its own copy: a shared weight would fall apart without a word."""
    tied = nn.Linear(4, 4)
    with pytest.raises((CutError, ModelError)):
        cut_model(built(tied, nn.ReLU(), tied, nn.Linear(4, 2)), "1")


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        *[(cut, "legal cuts: fc1.0, fc1, fc2.0, fc2") for cut in
          ("fc9", "", "fc", "fc1.7", "fc1.", "fc1.0.weight", "fc1@1")],
        ("flatten", "client half without parameters; nearest legal cuts: fc1.0 (after it)"),
        ("fc3", "server half without parameters; nearest legal cuts: fc2 (before it)"),
    ],
)  # fmt: skip
def test_illegal_cut_is_refused_and_the_nearest_legal_ones_are_named(cut, says):
    with pytest.raises(CutError) as caught:
        cut_model(build_model("mlp:8-6-5-4", 0, None), cut)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_activation_with_more_dimensions_than_a_frame_carries_is_refused():
    model = built(nn.Linear(4, 4), nn.Unflatten(1, (1, 1, 1, 2, 2)), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(CutError, match="6 dimensions"):
        cut_model(model, "1")


# -- models by name


def test_the_seed_decides_the_weights():
    def weights(seed):
        return torch.nn.utils.parameters_to_vector(
            build_model("mlp:8-6-4", seed, None).module.parameters()
        )

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet", None),
        ("resnet18:1", None),
        ("resnet18:c0", None),
        ("resnet18:10:x3", None),
        ("resnet18", (28, 28)),
        ("alexnet", (64,)),
        ("alexnet:10:c1", (1, 8, 8)),
        ("", None),
        ("mlp", None),
        ("mlp:", None),
        ("mlp:8", None),
        ("mlp:8-4", None),
        ("mlp:8-0-4", None),
        ("mlp:8--4-2", None),
        ("mlp:8-x-4", None),
        ("mlp:8-6-4", (9,)),
        ("conv:4", None),
        ("conv:0-4", None),
        ("conv:4-x", None),
        ("conv:4-8", (9, 2, 2, 2)),
        ("conv:4-8", (1, 1, 9)),
        ("lenet:1", None),
        ("lenet:ten", None),
        ("lenet:-3", None),
        ("lenet", (3, 32, 32)),
        ("nowhere.py:make", (4,)),
        ("nowhere.py:make", None),
    ],
)
def test_model_that_cannot_be_is_refused_by_name(name, shape):
    with pytest.raises(ModelError) as caught:
        build_model(name, 0, shape)
    assert name.partition(":")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sample_shape_may_come_without_dimensions_of_one():
    assert build_model("lenet:4", 0, (28, 28)).inputs[0].shape == (1, 28, 28)
    assert build_model("mlp:64-8-4", 0, (8, 8)).inputs[0].shape == (8, 8)
    assert build_model("conv:2-4", 0, (64,)).inputs[0].shape == (1, 8, 8)
    assert build_model("conv:2-4", 0, (3, 9, 8)).inputs[0].shape == (3, 9, 8)
    assert build_model("alexnet:10:c1:w2", 0, (28, 28)).inputs[0].shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def other(): return nn.Sequential()", "make"),
        ("make = 3", "make"),
        ("def make(): return torch.zeros(2)", "Tensor"),
        ("def make(): return None", "NoneType"),
        ("def make(width): return nn.Sequential()", "width"),
        ("def make(: pass", "SyntaxError"),
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("def make(): raise RuntimeError('first line\\nsecond line')", "first line"),
        ("raise SystemExit(2)", "SystemExit"),
        ("def make(): raise SystemExit", "SystemExit"),
    ],
)
def test_own_file_that_gives_no_model_is_refused_in_one_line(tmp_path, body, says):
    path = own(tmp_path, body)
    with pytest.raises(ModelError, match=says) as caught:
        build_model(f"{path}:make", 0, (4,))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_model_needs_a_sample_shape(tmp_path):
    path = own(tmp_path, "def make(): return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))")
    with pytest.raises(ModelError, match="sample"):
        build_model(f"{path}:make", 0, None)


@pytest.mark.parametrize(
    ("layers", "shape", "says"),
    [
        ("nn.Linear(4, 3), nn.Linear(3, 2)", (5,), "shape"),
        ("nn.Linear(4, 3), nn.Flatten(2), nn.Linear(3, 2)", (4,), "shape"),
        ("nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)", (1, 5, 5), "shape"),
        ("nn.Linear(4, 3), nn.LSTM(3, 2), nn.Linear(2, 2)", (4,), "shape"),
        ("nn.Linear(4, 3), nn.Linear(3, 1)", (4,), "class"),
        ("nn.Linear(4, 3), nn.Linear(3, 2)", (7, 4), "class"),
    ],
)
def test_own_model_that_does_not_fit_its_samples_is_refused_in_one_line(
    tmp_path, layers, shape, says
):
    path = own(tmp_path, f"def make(): return nn.Sequential({layers})")
    with pytest.raises(ModelError, match=says) as caught:
        cut_model(build_model(f"{path}:make", 0, shape), "0")
    assert "\n" not in str(caught.value)


def test_parameters_that_are_not_float32_are_refused_by_name(tmp_path):
    path = own(
        tmp_path, "def make(): return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).half()"
    )
    with pytest.raises(ModelError):
        export_model(f"{path}:make", "0", tmp_path / "out", seed=0, input_shape=(4,))


# -- own models whose folders stand alone


OWN = "def make(): return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))"


@pytest.mark.parametrize("place", ["plain", "with space", "run-10:30:00"])
def test_own_model_exports_to_and_from_folders_of_any_name(tmp_path, place):
    path = own(tmp_path / place, OWN)
    out = tmp_path / place / "out"
    exported = export_model(f"{path}:make", "0", out, seed=0, input_shape=(4,))
    assert load_halves(exported.server).classes == 2


def test_server_buffers_are_those_that_were_exported(tmp_path):
    """The file may fill them from anywhere; what was exported is what the run uses."""
    path = own(
        tmp_path,
        "import os\n"
        "def make():\n"
        "    norm = nn.BatchNorm1d(3)\n"
        "    norm.running_mean += torch.tensor([float(b) for b in os.urandom(3)])\n"
        "    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), norm, nn.Linear(3, 2))\n",
    )
    exported = export_model(f"{path}:make", "1", tmp_path / "out", seed=0, input_shape=(4,))
    buffers = [dict(load_halves(exported.server).server.module.named_buffers()) for _ in range(2)]
    assert len(buffers[0]) == 2
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
