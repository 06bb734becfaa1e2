"""First-order steps against a naive reference, and the cut gradient against loss differences."""

import numpy as np
import pytest
import torch
from core_support import tiny_config
from test_core_reference import flatten, forward
from torch.nn.functional import cross_entropy

from emulation.inprocess import InProcessFleet, make_shards
from export.cuts import cut_model
from export.models import build_model
from server_node.errors import ConfigError
from server_node.first_half import ExactSum, FirstHalf
from server_node.half import ServerHalf
from server_node.journal import RoundClosed, read_journal
from server_node.optimisers import OptimiserRule, check_optimiser
from server_node.prepare import prepare
from server_node.torch_half import Turn
from wire_protocol.directions import batch_indices

FIRST = ("method.server_order=first", "method.server_optimiser=Adam", "method.eta_s=0.01")


class Reference:
    """The server half by torch.optim on a copy per device, or on the pooled batch."""

    def __init__(self, config):
        self.config = config
        client, server, *_ = cut_model(build_model(config.model.name, 0, (64,)), config.model.cut)
        self.client_module, self.module = client.module, server.module
        self.client, self.server = flatten(client.module), flatten(server.module)
        self.states = None
        self.shards = make_shards(config)
        everything = np.concatenate([s.xs[0] for s in self.shards]).astype(np.float64)
        self.mean, self.std = everything.mean(), everything.std()

    def batch(self, device, number):
        shard = self.shards[device]
        chosen = batch_indices(0, device, number, self.config.devices.batch, shard.samples)
        x = ((shard.xs[0][chosen] - self.mean) / self.std).astype(np.float32)
        return forward(self.client_module, self.client, torch.from_numpy(x)).detach(), (
            torch.from_numpy(shard.y[chosen])
        )

    def copy(self, batches, factor):
        """Weights and Adam state after tau steps on the batches."""
        h, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
        weights = self.server.clone().requires_grad_()
        optimiser = torch.optim.Adam([weights], lr=0.01 * factor)
        if self.states is not None:
            optimiser.state[weights] = {key: value.clone() for key, value in self.states.items()}
        for _ in range(self.config.method.tau):
            optimiser.zero_grad()
            cross_entropy(forward(self.module, weights, h), labels).backward()
            optimiser.step()
        return weights.detach(), optimiser.state[weights]

    def round(self, number, factor):
        batches = [self.batch(device, number) for device in range(self.config.devices.count)]
        pooled = self.config.method.server_batch == "pooled"
        copies = [
            self.copy(group, factor) for group in ([batches] if pooled else map(list, zip(batches)))
        ]
        self.server += self.config.method.eta_g * (
            torch.stack([weights for weights, _ in copies]).mean(0) - self.server
        )
        self.states = {
            key: torch.stack([state[key] for _, state in copies]).mean(0) for key in copies[0][1]
        }


@pytest.mark.parametrize("batch", ["device", "pooled"])
def test_first_order_rounds_are_those_of_torch_optim_on_a_copy(batch, tmp_path):
    config = tiny_config(
        *FIRST, f"method.server_batch={batch}", "method.eta_c=0", "method.eta_g=0.7",
        "method.schedule=constant", "evaluation.control=false",
    )  # fmt: skip
    run = InProcessFleet(prepare(config, tmp_path)).run()
    reference = Reference(config)
    for number in range(3):
        reference.round(number, 1.0)
    np.testing.assert_allclose(run.server, reference.server.numpy(), rtol=2e-5, atol=2e-6)
    rounds = [
        r for r in read_journal(tmp_path / "journal.bin").records if isinstance(r, RoundClosed)
    ]
    steppers = [[s.device for s in r.shares if s.server_steps] for r in rounds]
    assert steppers == [[0, 1, 2] if batch == "device" else [0]] * 3
    assert all(not s.server_scalars for r in rounds for s in r.shares)
    assert all(sum(s.server_weight for s in r.shares) == pytest.approx(1.0) for r in rounds)


@pytest.mark.parametrize("order", ["zeroth", "first"])
def test_the_cut_gradient_tells_what_loss_differences_tell(order, tmp_path):
    """Correlation of the scalars of round 0, where both runs have the same weights."""
    overrides = [*(FIRST if order == "first" else ()), "run.rounds=1", "method.lam=1e-3",
                 "method.directions_client=64", "evaluation.control=false"]  # fmt: skip
    scalars = {}
    for feedback in ("loss_difference", "cut_gradient"):
        folder = tmp_path / feedback
        InProcessFleet(
            prepare(tiny_config(*overrides, f"method.feedback={feedback}"), folder)
        ).run()
        closed = next(
            r for r in read_journal(folder / "journal.bin").records if isinstance(r, RoundClosed)
        )
        scalars[feedback] = np.concatenate(
            [np.frombuffer(share.client_scalars, "<f4") for share in closed.shares]
        )
    loss, cut = scalars["loss_difference"], scalars["cut_gradient"]
    assert len(cut) == 3 * 64
    assert np.corrcoef(loss, cut)[0, 1] > 0.99
    assert np.std(cut) == pytest.approx(np.std(loss), rel=0.02)


def test_the_sum_of_copies_has_the_same_bits_in_every_order():
    generator = np.random.default_rng(0)
    scale = 10.0 ** generator.integers(-12, 3, (9, 500))
    addends = torch.from_numpy((generator.standard_normal((9, 500)) * scale).astype(np.float32))
    results = set()
    for _ in range(20):
        total = ExactSum(500, torch.device("cpu"))
        for row in generator.permutation(9):
            total.add(addends[row])
        results.add(total.mean(slice(0, 500)).float().numpy().tobytes())
    assert len(results) == 1


@pytest.fixture
def halves():
    """A small half in both orders, with a batch."""

    def build(kind, **more):
        _, server, *_ = cut_model(build_model("mlp:64-12-10", 0, (64,)), "fc1")
        weights = flatten(server.module).numpy().copy()
        return kind(server.module, weights, device=torch.device("cpu"), **more)

    return build


def test_the_cut_gradient_is_autograds_at_the_stepped_copy(halves):
    half = halves(FirstHalf, rule=OptimiserRule("SGD", {}))
    h = np.random.default_rng(1).standard_normal((5, 12)).astype(np.float32)
    batch = half.place(h, np.arange(5, dtype=np.uint32))
    half.start_round(0, 0.1)
    done = half.steps([Turn(0, 0, batch, [])])
    got = half.cut_gradient(0, batch, done)
    assert half.keep()
    half.commit(1.0)
    _, server, *_ = cut_model(build_model("mlp:64-12-10", 0, (64,)), "fc1")
    x = torch.from_numpy(h).requires_grad_()
    cross_entropy(
        forward(server.module, torch.from_numpy(half.weights), x), torch.arange(5)
    ).backward()
    np.testing.assert_allclose(got, x.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_both_orders_agree_on_the_gradient_before_any_step(halves):
    first = halves(FirstHalf, rule=OptimiserRule("Adam", {}))
    zeroth = halves(ServerHalf, run_seed=0, lam=1e-3, directions=1)
    h = np.ones((2, 12), np.float32)
    batch = zeroth.place(h, np.zeros(2, np.uint32))
    want = zeroth.cut_gradient(0, batch, [])
    first.start_round(0, 0.0)
    done = first.steps([Turn(0, 0, batch, [])])
    np.testing.assert_array_equal(first.cut_gradient(0, batch, done), want)


def test_a_copy_that_is_not_finite_does_not_enter_the_average(halves):
    half = halves(FirstHalf, rule=OptimiserRule("SGD", {}))
    before = half.weights
    batch = half.place(np.ones((2, 12), np.float32), np.zeros(2, np.uint32))
    half.start_round(0, 1e38)
    half.steps([Turn(0, 0, batch, [])])
    half.steps([Turn(0, 0, batch, [[0.0]])])
    assert not half.keep()
    half.commit(1.0)
    np.testing.assert_array_equal(half.weights, before)


@pytest.mark.parametrize(
    "name",
    ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD",
     "Rprop"],
)  # fmt: skip
def test_optimisers_with_a_flat_state_are_taken(name, halves):
    check_optimiser(OptimiserRule(name, {}))
    half = halves(FirstHalf, rule=OptimiserRule(name, {}))
    batch = half.place(np.ones((2, 12), np.float32), np.zeros(2, np.uint32))
    for number in range(2):
        half.start_round(number, 0.01)
        half.steps([Turn(0, 0, batch, [])])
        assert half.keep()
        half.commit(1.0)
    again = halves(FirstHalf, rule=OptimiserRule(name, {}))
    again.load(half.weights)
    again.restore(half.optimiser_state)
    for each in (half, again):
        each.start_round(2, 0.01)
        each.steps([Turn(0, 0, batch, [])])
        each.keep()
        each.commit(1.0)
    np.testing.assert_array_equal(half.weights, again.weights)
    np.testing.assert_array_equal(half.optimiser_state, again.optimiser_state)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("LBFGS", {}, "LBFGS cannot step"),
        ("SparseAdam", {}, "SparseAdam cannot step"),
        ("lr_scheduler", {}, "has no 'lr_scheduler'"),
        ("Sgd", {}, "has no 'Sgd'"),
        ("Adam", {"momentum": 0.9}, "refuses them"),
        ("Adam", {"betas": [0.9, 2.0]}, "refuses them"),
        ("SGD", {"momentum": -1.0}, "refuses them"),
    ],
)
def test_other_optimisers_and_options_are_refused_in_one_line(name, options, text):
    with pytest.raises(ConfigError, match=r"method\.server_opti") as caught:
        check_optimiser(OptimiserRule(name, options))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
