"""Models of all kinds: where they may be cut, why not elsewhere, and that halves are the whole."""

import math

import pytest
import torch
from own_models import HEADER, SHAPES, write_model
from torch import nn

from export.cuts import boundaries, cut_model, cut_traced
from export.errors import CutError, ModelError
from export.exporter import export_model
from export.inputs import example
from export.listing import as_json, list_cuts, table
from export.models import BuiltModel, build_model
from export.server_half import ModelInput
from export.tracing import index_limits, trace
from export.zoo import build_zoo

LEGAL = {
    "residual": ["stem", "blocks.0", "blocks"],
    "shared": ["first", "twice@1", "drop@1"],
    "batchnorm": ["body.0", "body.1", "body.2", "body.3", "body"],
    "flatten": ["conv", "flat", "fc"],
    "embedding": ["embedding", "block.norm1", "block"],
    "two": ["both"],
}


class Kind:
    """A user's model, traced once."""

    def __init__(self, name, folder):
        self.model = build_model(write_model(folder, name), 3, SHAPES[name])
        self.name, self.traced = name, trace(self.model)

    def samples(self, batch):
        random = torch.Generator().manual_seed(1)
        return [
            torch.randint(0, 5, (batch, *i.shape), generator=random)
            if i.dtype == "int64"
            else torch.randn(batch, *i.shape, generator=random)
            for i in self.model.inputs
        ]


@pytest.fixture(scope="module", params=list(LEGAL))
def kind(request, tmp_path_factory):
    return Kind(request.param, tmp_path_factory.mktemp(request.param))


def test_every_boundary_that_a_single_tensor_crosses_is_a_cut_and_no_other(kind):
    legal = [place.name for place in boundaries(kind.traced) if not place.fault]
    assert legal == LEGAL[kind.name]


@pytest.mark.parametrize("batch", [1, 4])
def test_both_halves_of_every_cut_are_the_whole_bit_for_bit(kind, batch):
    xs = kind.samples(batch)
    torch.backends.mha.set_fastpath_enabled(False)  # the fused layer rounds otherwise
    with torch.no_grad():
        want = kind.model.module(*xs)
        for cut in LEGAL[kind.name]:
            halves = cut_traced(kind.traced, cut)
            h = halves.client.module(*xs)
            assert h.shape == (batch, *halves.activation_shape)
            assert torch.equal(halves.server.module(h), want)
            assert torch.equal(halves.server.module(h), want)  # and h is left as it was
    torch.backends.mha.set_fastpath_enabled(True)


def test_each_parameter_belongs_to_one_half_under_its_own_name(kind):
    whole = dict(kind.model.module.named_parameters())
    for cut in LEGAL[kind.name]:
        halves = cut_traced(kind.traced, cut)
        names = []
        for half in halves.client, halves.server:
            own = dict(half.module.named_parameters())
            assert list(own) == list(half.parameter_names)
            assert all(own[n] is whole[name] for n, name in half.parameter_names.items())
            names.append(list(half.parameter_names.values()))
            order = [name for name in whole if name in names[-1]]
            assert names[-1] == order
        assert sorted(names[0] + names[1]) == sorted(whole)


@pytest.mark.parametrize(
    ("name", "cut", "says"),
    [
        ("residual", "blocks.1.conv2", "several tensors cross: the output of blocks.0 too;"),
        ("residual", "blocks.1.conv2", "legal cuts: blocks.0 (before it), blocks (after it)"),
        ("shared", "twice", "both sides share weights, which the halves would train apart: twice."),
        ("shared", "twice", "nearest legal cuts: first (before it), twice@1 (after it)"),
        ("embedding", "positions", "computes nothing there that the input reaches"),
        ("embedding", "block.self_attn", "an operation of the model's own forward too"),
        ("embedding", "block.linear1", "the output of block.norm1 too"),
        ("two", "dense", "the model's input token too"),
        ("batchnorm", "head", "server half without parameters"),
        ("flatten", "conv9", "no module of that name; legal cuts: conv, flat, fc"),
    ],
)  # fmt: skip
def test_illegal_cut_says_why_and_names_the_nearest(tmp_path, name, cut, says):
    model = build_model(write_model(tmp_path, name), 0, SHAPES[name])
    with pytest.raises(CutError) as caught:
        cut_model(model, cut)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def built(module, *shapes, dtype="float32"):
    return BuiltModel("own", module.eval(), tuple(ModelInput(s, dtype) for s in shapes))


class Through(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function, *, tied=False):
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()
        self.head = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.register_buffer("count", torch.zeros(1))
        self.function = function
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.idle(self.function(self, self.a(x)))))


def test_tied_parameters_are_one_and_cannot_be_parted():
    tied = built(Through(lambda _, h: h, tied=True), (4,))
    with pytest.raises(CutError, match=r"share weights.*: a\.weight; nearest .*: b \(after it\)"):
        cut_model(tied, "a")
    client = cut_model(tied, "b").client
    assert list(client.parameter_names.values()) == ["a.weight", "a.bias", "b.bias"]


def test_what_crosses_must_have_the_batch_in_front():
    model = built(Through(lambda _, h: h.reshape(-1).reshape(-1, 4)), (4,))
    assert cut_model(model, "b").activation_shape == (4,)
    flat = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 2))
    with pytest.raises(CutError, match="batch is not its first dimension"):
        cut_model(built(flat, (4,)), "1")


def test_a_module_that_computes_nothing_is_told_from_one_that_is_not_there():
    model = built(Through(lambda _, h: h), (4,))
    with pytest.raises(CutError, match="computes nothing"):
        cut_model(model, "idle")
    with pytest.raises(CutError, match="no module of that name"):
        cut_model(model, "iddle")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda _, h: h * 2 if h.sum() > 0 else h, "depend on values"),
        (lambda _, h: h * float(h.sum()), "depend on values"),
        (lambda _, h: h.view(2, 4), "batch"),
        (lambda _, h: nn.functional.dropout(h), "random numbers"),
        (lambda _, h: h + torch.rand_like(h), "random numbers"),
        (lambda m, h: m.norm(h), "norm uses the statistics of each batch"),
        (lambda m, h: h + m.count.add_(1), "changes its own state"),
    ],
)
def test_model_that_no_half_can_repeat_is_refused_in_one_line(function, says):
    with pytest.raises(ModelError, match=says) as caught:
        trace(built(Through(function), (4,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("give", "says"),
    [
        (lambda y: {"scores": y}, "gives a dict"),
        (lambda y: (y,), "gives a tuple"),
        (lambda y: y.mean(), "one number per class"),
        (lambda y: y.argmax(1), "one number per class"),
        (lambda y: y[:1], "one row of class scores per sample"),
    ],
)
def test_what_a_model_gives_must_be_one_row_of_scores_per_sample(give, says):
    class Gives(nn.Sequential):
        def forward(self, x):
            return give(super().forward(x))

    with pytest.raises(ModelError, match=says):
        trace(built(Gives(nn.Linear(4, 4), nn.Linear(4, 2)), (4,)))


def test_a_sample_whose_result_depends_on_its_batch_is_refused(tmp_path):
    (tmp_path / "m.py").write_text(
        HEADER + "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Linear(4, 4), nn.Linear(4, 2))\n"
        "    def forward(self, x):\n"
        "        return super().forward(x - x.mean(0))\n"
    )
    with pytest.raises(ModelError, match="depends on the other samples"):
        export_model(f"{tmp_path}/m.py:Net", "0", tmp_path, seed=0, input_shape=(4,))


def test_list_counts_parameters_bytes_and_operations():
    convolution = nn.Conv2d(1, 3, 3)
    model = built(
        nn.Sequential(convolution, nn.Flatten(), nn.Linear(48, 7), nn.Linear(7, 2)), (1, 6, 6)
    )
    listed = list_cuts(model)
    flops = 2 * 9 * 3 * 16
    assert [tuple(cut) for cut in listed.cuts] == [
        ("0", [], 30, 343 + 16, (3, 4, 4), 192, flops),
        ("1", [], 30, 343 + 16, (48,), 192, flops),
        ("2", [], 373, 16, (7,), 28, flops + 2 * 48 * 7),
    ]
    assert listed.illegal == [("3", "it leaves the server half without parameters")]
    assert as_json(listed)["cuts"][2]["client_flops_per_sample"] == flops + 672
    lines = table(listed).splitlines()
    assert lines[0].split() == ["cut", "d_c", "d_s", "activation", "bytes/sample", "client",
                                "FLOPs/sample"]  # fmt: skip
    assert lines[1].split() == ["0", "30", "359", "3x4x4", "192", "864"]
    assert lines[-1].split()[0] == "3"


def test_attention_is_counted_in_its_plain_form():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = built(nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 2)), (5, 8))
    projections, attention, feed_forward = 2 * 5 * 8 * 32, 2 * 2 * 5 * 5 * 8, 2 * 2 * 5 * 8 * 16
    (first, *_) = [cut for cut in list_cuts(model).cuts if cut.cut == "0"]
    assert first.client_flops_per_sample == projections + attention + feed_forward


def test_constants_are_made_on_the_device_of_what_comes_in(tmp_path):
    """`meta` stands for any other device: a constant on the CPU would not add to it."""
    model = build_model(write_model(tmp_path, "embedding"), 0, SHAPES["embedding"])
    client = cut_model(model, "block").client.module.to("meta")
    assert client(example(model.inputs, 2)[0].to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("alexnet", 3_868_746),  # GAS (AAAI 2025)
        ("alexnet-white", 3_868_746),
        ("alexnet:10:c1", 3_868_170),
        ("alexnet:10:w8", 243_354),
        ("resnet18", 11_173_962),
        ("resnet18-bn", 11_173_962),
        ("mobilenetv2:10:w32", 2_236_682),  # as torchvision's of 10 classes
        ("lenet", 61_706),
    ],
)
def test_zoo_models_have_the_published_sizes(name, parameters):
    module, _ = build_zoo(name, None)
    assert sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18:4:w8", "mobilenetv2-bn:4:w8"])
def test_zoo_models_are_cut_after_every_block(name):
    model = build_model(name, 0, (3, 16, 16))
    traced = trace(model)
    legal = [place.name for place in boundaries(traced) if not place.fault]
    blocks = [n for n, m in model.module.named_modules() if n.count(".") == 1 and "layer" in n]
    stages = [n for n, _ in model.module.named_children() if n not in ("flatten", "fc")]
    ends = {f"{n}.{len(getattr(model.module, n)) - 1}" for n in stages if n.startswith("layer")}
    assert set(legal) >= set(stages) | (set(blocks) - ends)
    halves = cut_traced(traced, "layer2.0")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        h = halves.client.module(x)
        assert torch.equal(halves.server.module(h), model.module(x))
    assert math.prod(halves.activation_shape) == h[0].numel()


# -- inputs


def test_integers_are_found_out_with_the_size_of_their_table(tmp_path):
    model = build_model(write_model(tmp_path, "embedding"), 0, ["5"])
    assert model.inputs == (ModelInput((5,), "int64"),)
    assert index_limits(trace(model)) == [20]


def test_floats_that_a_model_uses_as_an_index_are_refused(tmp_path):
    (tmp_path / "m.py").write_text(
        HEADER + "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.e, self.h = nn.Embedding(9, 4), nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.h(self.e(x.long()).mean(1))\n"
    )
    traced = trace(build_model(f"{tmp_path}/m.py:Net", 0, ["5"]))
    with pytest.raises(ModelError, match=r"index into e\.weight: give --input-shape int:N"):
        index_limits(traced)


@pytest.mark.parametrize(
    ("kind_", "shape", "says"),
    [
        ("flatten", ["6,6,2"], "does not take samples"),
        ("flatten", ["6,6"], r"it takes \(1, 6, 6\): give --input-shape 1,6,6"),
        ("two", ["3"], "does not take samples"),
        ("two", ["4", "int:1"], "one --input-shape for each input"),
        ("two", ["3", "int:x"], "positive numbers"),
        ("two", ["3", 4], "write one shape"),
        ("flatten", ["1,1,1,1,6,6"], "more than 5 dimensions"),
    ],
)
def test_wrong_input_shape_is_told_with_what_to_write(tmp_path, kind_, shape, says):
    with pytest.raises(ModelError, match=says) as caught:
        build_model(write_model(tmp_path, kind_), 0, shape)
    assert "\n" not in str(caught.value)
