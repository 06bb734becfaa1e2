"""The arithmetic against a naive reference: MU-SplitFed (arXiv 2510.21155, alg. 1) as written.

Departures of this project, all documented: server differences are measured at h + d/2 and h - d/2
where d = h+ - h-, with the server half unperturbed; signs instead of a sphere; several directions
are averaged; what is sent and averaged are scalars.
"""

import numpy as np
import pytest
import torch
from core_support import play, tiny_config
from torch import nn
from torch.nn.functional import cross_entropy

from emulation.inprocess import make_shards
from export.cuts import cut_model
from export.models import BuiltModel, build_model
from export.server_half import ModelInput
from server_node.half import ServerHalf
from server_node.journal import RoundClosed, read_journal
from server_node.prepare import prepare
from server_node.torch_half import Turn
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream, batch_indices
from wire_protocol.directions import participants as draw

SIGNS = DirectionGenerator()


def signs(half, device, number, step, k, size, seed=0):
    return torch.from_numpy(SIGNS.signs(DirectionId(seed, half, device, number, step, k), 0, size))


def forward(module, flat, x):
    """The module's output with its parameters taken from a flat vector."""
    state, offset = {}, 0
    for name, parameter in module.named_parameters():
        state[name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return torch.func.functional_call(module, state, (x,))


def flatten(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class Reference:
    """M replicas of both halves, averaged each round: nothing shared with the server's code."""

    def __init__(self, config):
        self.config = config
        model = build_model(config.model.name, config.run.seed, (64,))
        client, server, *_ = cut_model(model, config.model.cut)
        self.client_module, self.server_module = client.module, server.module
        self.client, self.server = flatten(client.module), flatten(server.module)
        shards = make_shards(config)
        everything = np.concatenate([shard.xs[0] for shard in shards]).astype(np.float64)
        self.mean, self.std = everything.mean(), everything.std()
        self.shards = shards

    def batch(self, device, number):
        shard = self.shards[device]
        size = self.config.devices.batch
        chosen = batch_indices(self.config.run.seed, device, number, size, shard.samples)
        x = (shard.xs[0][chosen].astype(np.float64) - self.mean) / self.std
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(shard.y[chosen])

    def round(self, number, factor):
        """One global round; returns the scalars by device as (client, server)."""
        method = self.config.method
        lam, replicas, scalars = method.lam, [], {}
        chosen = draw(
            self.config.run.seed, number, list(range(self.config.devices.count)),
            self.config.participants,
        )  # fmt: skip
        for device in chosen:
            x, y = self.batch(device, number)
            h = forward(self.client_module, self.client, x)
            server, server_scalars = self.server.clone(), []
            for step in range(method.tau):
                update, row = torch.zeros_like(server), []
                for k in range(method.directions_server):
                    u = signs(Stream.SERVER_HALF, device, number, step, k, len(server))
                    delta = self.loss(server + lam * u, h, y) - self.loss(server - lam * u, h, y)
                    update += delta / (2 * lam) * u / method.directions_server
                    row.append(delta)
                server = server - method.eta_s * factor * update
                server_scalars.append(row)
            client, client_scalars = self.client.clone(), []
            for k in range(method.directions_client):
                u = signs(Stream.CLIENT_HALF, device, number, 0, k, len(client))
                plus = forward(self.client_module, self.client + lam * u, x)
                minus = forward(self.client_module, self.client - lam * u, x)
                half = (plus - minus) / 2
                delta = self.loss(server, h + half, y) - self.loss(server, h - half, y)
                client -= method.eta_c * factor * delta / (2 * lam) * u / method.directions_client
                client_scalars.append(delta)
            replicas.append((client, server))
            scalars[device] = (client_scalars, server_scalars)
        weight = method.eta_g / len(replicas)
        self.client = self.client + weight * sum(c - self.client for c, _ in replicas)
        self.server = self.server + weight * sum(s - self.server for _, s in replicas)
        return scalars

    def loss(self, server, h, y):
        return float(cross_entropy(forward(self.server_module, server, h), y))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.tau=1", "method.directions_client=1"],
        ["method.tau=3", "method.directions_server=2", "method.eta_g=0.7"],
        ["method.tau=2", "devices.participants=2", "method.eta_g=1.3"],
    ],
    ids=["plain", "several directions", "partial participation"],
)
@torch.no_grad()
def test_two_rounds_equal_the_reference(tmp_path, overrides):
    config = tiny_config(
        "run.rounds=2", "method.lam=0.05", "method.eta_c=0.02", "method.eta_s=0.02", *overrides
    )
    run = play(prepare(config, tmp_path), tmp_path / "run")
    records = read_journal(tmp_path / "run" / "journal.bin").records
    rounds = [record for record in records if isinstance(record, RoundClosed)]
    reference = Reference(config)
    before = reference.client, reference.server
    for record, factor in zip(rounds, (1.0, 0.5), strict=True):
        scalars = reference.round(record.round, factor)
        assert [share.device for share in record.shares] == list(scalars)
        for share in record.shares:
            client, server = scalars[share.device]
            got = np.frombuffer(share.client_scalars, "<f4")
            np.testing.assert_allclose(got, client, atol=2e-6)
            got = np.frombuffer(share.server_scalars, "<f4")
            np.testing.assert_allclose(got, np.ravel(server), atol=2e-6)
    np.testing.assert_allclose(run.client, reference.client, rtol=0, atol=1e-6)
    np.testing.assert_allclose(run.server, reference.server, rtol=0, atol=1e-6)
    assert float((reference.client - before[0]).abs().max()) > 1e-3
    assert float((reference.server - before[1]).abs().max()) > 1e-3


# -- the estimate is the directional derivative


def smooth_halves():
    """Tanh instead of ReLU: at a kink a finite difference is no derivative."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    halves = cut_model(
        BuiltModel("smooth", nn.Sequential(*layers), (ModelInput((6,), "float32"),)), "1"
    )
    return halves.client.module, halves.server.module


class Bench:
    """A server half, a client half and a batch, without export or run."""

    lam = 1e-3

    def __init__(self, directions):
        self.client_module, self.server_module = smooth_halves()
        self.client, self.server = flatten(self.client_module), flatten(self.server_module)
        self.x, self.y = torch.randn(32, 6), torch.arange(32) % 4
        self.half = ServerHalf(
            smooth_halves()[1], self.server.numpy(), run_seed=0, lam=self.lam,
            directions=directions, device=torch.device("cpu"),
        )  # fmt: skip
        self.h = forward(self.client_module, self.client, self.x)
        self.batch = self.half.place(self.h.detach().numpy(), self.y.numpy().astype(np.uint32))

    def step(self, device, done):
        [scalars] = self.half.steps([Turn(0, device, self.batch, done)])
        return scalars

    def gradients(self, server):
        """Of the loss of both halves, at the initial client weights and these server weights."""
        client = self.client.clone().requires_grad_()
        server = server.clone().requires_grad_()
        h = forward(self.client_module, client, self.x)
        loss = cross_entropy(forward(self.server_module, server, h), self.y)
        return torch.autograd.grad(loss, (client, server))


def assert_derivatives(scalars, gradient, directions, lam):
    """delta / (2 lam) is <gradient, u> within 1 % of the gradient's length."""
    want = np.array([float(gradient @ u) for u in directions])
    np.testing.assert_allclose(
        np.array(scalars) / (2 * lam), want, rtol=0, atol=0.01 * float(gradient.norm())
    )
    assert np.abs(want).max() > 0.5 * float(gradient.norm())


def test_server_scalars_are_directional_derivatives_at_each_step():
    bench = Bench(directions=8)
    size, server, done = len(bench.server), bench.server, []
    bench.half.start_round(5, eta=0.05)
    for step in range(3):
        scalars = bench.step(2, done)
        us = [signs(Stream.SERVER_HALF, 2, 5, step, k, size) for k in range(8)]
        assert_derivatives(scalars, bench.gradients(server)[1], us, bench.lam)
        server = server - 0.05 / 8 * sum(
            d / (2 * bench.lam) * u for d, u in zip(scalars, us, strict=True)
        )
        done.append(scalars)


def test_client_scalars_are_directional_derivatives_through_both_halves_after_the_steps():
    bench = Bench(directions=1)
    bench.half.start_round(0, eta=0.5)
    done, server = [], bench.server
    for step in range(4):
        done.append(bench.step(1, done))
        u = signs(Stream.SERVER_HALF, 1, 0, step, 0, len(server))
        server = server - 0.5 * done[-1][0] / (2 * bench.lam) * u
    us = [signs(Stream.CLIENT_HALF, 1, 0, 0, k, len(bench.client)) for k in range(8)]
    differences = torch.stack(
        [
            forward(bench.client_module, bench.client + bench.lam * u, bench.x)
            - forward(bench.client_module, bench.client - bench.lam * u, bench.x)
            for u in us
        ]
    )
    scalars = bench.half.measure(1, bench.batch, differences.detach().numpy(), done)
    assert_derivatives(scalars, bench.gradients(server)[0], us, bench.lam)
    first = bench.gradients(bench.server)[0]
    assert float((first - bench.gradients(server)[0]).norm()) > 0.05 * float(first.norm())


def test_a_working_copy_is_rebuilt_exactly_when_the_server_comes_back_to_a_device():
    """Steps of two devices in turns equal the steps of each alone, bit for bit."""
    bench = Bench(directions=2)
    bench.half.start_round(0, eta=0.1)
    alone = {}
    for device in (0, 1):
        alone[device] = []
        for _ in range(3):
            alone[device].append(bench.step(device, alone[device]))
    turns = {0: [], 1: []}
    for _ in range(3):
        for device in (1, 0):
            turns[device].append(bench.step(device, turns[device]))
    assert turns == alone
    assert alone[0] != alone[1]


def test_measuring_does_not_depend_on_how_differences_are_grouped():
    bench = Bench(directions=1)
    bench.half.start_round(0, eta=0.1)
    differences = 0.01 * np.random.default_rng(0).standard_normal((5, 32, 16)).astype(np.float32)
    together = bench.half.measure(0, bench.batch, differences, [])
    apart = [bench.half.measure(0, bench.batch, d[None], [])[0] for d in differences]
    np.testing.assert_allclose(apart, together, rtol=0, atol=1e-6)
