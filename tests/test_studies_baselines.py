"""Baselines against references written here, with nothing of their code; counters and clocks."""

import numpy as np
import pytest
import torch
from core_support import play, tiny_config
from torch import nn
from torch.nn.functional import cross_entropy

from export.models import build_model
from server_node.config import check_config
from server_node.prepare import prepare
from studies.baselines import BASELINES, run_baseline
from studies.baselines.label_gaussians import LabelGaussians
from studies.baselines.zeroth import zo_splitfed
from studies.errors import StudyError
from studies.harness import Bench, Setting
from studies.timeline import Instant, Leg, Trip, in_turn_s, parallel_s, serial_s
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream, participants
from wire_protocol.frames import HEADER_BYTES

BASE = [
    "model.name=mlp:64-12-10",
    "evaluation.every=1",
    "data.alpha=0.5",
    "method.schedule=constant",
]
SIGNS = DirectionGenerator()


class Recording(Bench):
    """A bench that keeps the weights it is asked to score."""

    def scores(self, client, server):
        self.seen.append((client.detach().clone(), server.detach().clone()))
        return super().scores(client, server)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def experiment(folder):
    """One model on one data set, exported once: all else of a configuration may differ."""
    return prepare(tiny_config(*BASE), folder / "shared")


@pytest.fixture(scope="module")
def benches(experiment):
    def make(*overrides, **setting):
        config = tiny_config(*BASE, *overrides)
        bench = Recording(Setting(config, **setting), experiment)
        bench.seen = []
        return bench

    return make


def weights_after(bench, name, **options):
    """Weights of the whole model (d,) after each round, and the points."""
    points = run_baseline(name, bench, options)
    return [torch.cat(halves) for halves in bench.seen], points


class Central:
    """The whole model in one place."""

    def __init__(self, bench):
        self.bench = bench
        model = build_model(bench.config.model.name, bench.config.run.seed, (64,)).module
        self.model = model
        self.client_size = sum(p.numel() for p in [*model.parameters()][:2])

    @property
    def flat(self):
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def gradient(self, flat, batches):
        """Of the mean loss over all samples of the batches, at weights `flat`."""
        nn.utils.vector_to_parameters(flat, self.model.parameters())
        x = torch.cat([batch.xs[0] for batch in batches])
        y = torch.cat([batch.labels for batch in batches])
        loss = cross_entropy(self.model(x), y)
        gradients = torch.autograd.grad(loss, [*self.model.parameters()])
        return torch.cat([g.reshape(-1) for g in gradients])


def assert_close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# -- SplitFed and federated averaging


@pytest.mark.parametrize(
    ("optimiser", "options"),
    [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {}), ("Adagrad", {})],
)
@pytest.mark.parametrize("name", ["splitfed_v1", "splitfed_v2", "fedavg"])
def test_with_one_client_it_is_centralised_training(benches, name, optimiser, options):
    bench = benches("devices.count=1", "run.rounds=12", "data.alpha=0.0")
    eta = 0.1 if optimiser == "SGD" else 0.01
    etas = {"eta": eta} if name == "fedavg" else {"eta_c": eta, "eta_s": eta}
    got, _ = weights_after(bench, name, optimiser=optimiser, optimiser_options=options, **etas)
    central = Central(bench)
    made = getattr(torch.optim, optimiser)(central.model.parameters(), lr=eta, **options)
    for number, have in enumerate(got):
        batch = bench.batch(0, number)
        made.zero_grad()
        cross_entropy(central.model(batch.xs[0]), batch.labels).backward()
        made.step()
        assert_close(have, central.flat)
    assert float((got[-1] - got[0]).abs().max()) > 1e-2


def test_version_1_averages_replicas_by_samples(benches):
    bench = benches("devices.participants=2")
    got, points = weights_after(bench, "splitfed_v1", eta_c=0.2, eta_s=0.2, local_steps=2)
    central, eta = Central(bench), 0.2
    flat = central.flat
    for number, have in enumerate(got):
        chosen = participants(bench.config.run.seed, number, [0, 1, 2], 2)
        counts = [bench.shards[device].samples for device in chosen]
        replicas = []
        for device in chosen:
            replica = flat.clone()
            for step in (0, 1):
                batch = bench.batch(device, 2 * number + step)
                replica = replica - eta * central.gradient(replica, [batch])
            replicas.append(replica)
        flat = sum(n / sum(counts) * r for n, r in zip(counts, replicas, strict=True))
        assert_close(have, flat)
    assert counts[0] != counts[1]
    assert points[-1].server_steps == 3 * 2 * 2


def test_federated_averaging_is_version_1_without_the_wire(benches):
    options = {"local_steps": 3, "weighting": "uniform", "optimiser": "Adam"}
    split, _ = weights_after(benches(), "splitfed_v1", eta_c=0.01, eta_s=0.01, **options)
    whole, points = weights_after(benches(), "fedavg", eta=0.01, **options)
    assert_close(torch.stack(whole), torch.stack(split))
    size_bytes = 4 * whole[0].numel()
    assert points[0].bytes_up == points[0].bytes_down == 3 * size_bytes
    # 64-12-10: the whole model multiplies (768 + 120) / 768 times as often as its first layer.
    assert points[0].client_forwards == pytest.approx(3 * 3 * 3 * 888 / 768)
    assert points[0].server_steps == 0


def test_version_2_serves_one_device_after_the_other(benches):
    bench = benches()
    got, _ = weights_after(bench, "splitfed_v2", eta_c=0.2, eta_s=0.2, weighting="uniform")
    central, orders = Central(bench), set()
    size, flat = central.client_size, central.flat
    for number, have in enumerate(got):
        candidates = {}
        for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
            server, clients = flat[size:], []
            for device in order:
                here = torch.cat([flat[:size], server])
                here = here - 0.2 * central.gradient(here, [bench.batch(device, number)])
                server = here[size:]
                clients.append(here[:size])
            candidates[order] = torch.cat([sum(clients) / 3, server])
        order = min(candidates, key=lambda o: float((candidates[o] - have).abs().max()))
        orders.add(order)
        flat = candidates[order]
        assert_close(have, flat)
    assert len(orders) > 1


def test_bytes_are_those_of_frames_and_weights(benches):
    bench = benches()
    _, points = weights_after(bench, "splitfed_v1")
    frame, labels = HEADER_BYTES + 8 * 12 * 4, 8
    size_bytes = 4 * (64 * 12 + 12)
    assert points[0].bytes_up == 3 * (frame + labels + size_bytes)
    assert points[0].bytes_down == 3 * (frame + size_bytes)
    assert points[0].client_forwards == 9
    small = benches("wire.encoding=int8", "wire.compression=zstd")
    _, fewer = weights_after(small, "splitfed_v1")
    assert fewer[0].bytes_up < points[0].bytes_up
    assert fewer[-1].loss == pytest.approx(points[-1].loss, abs=0.05)
    assert fewer[-1].loss != points[-1].loss


# -- zeroth-order SplitFed


def test_zeroth_order_splitfed_is_our_method_at_tau_1(folder, experiment):
    config = tiny_config("method.tau=1", "method.eta_c=0.02", "method.eta_s=0.02")
    other = tiny_config(
        "method.tau=7", "method.tau_mode=adaptive", "method.server_order=first",
        "method.eta_c=0.02", "method.eta_s=0.02",
    )  # fmt: skip
    assert zo_splitfed(other) == config
    digests = []
    for name, have in (("ours", config), ("theirs", zo_splitfed(other))):
        run = play(experiment._replace(config=have), folder / f"zo-{name}")
        digests.append((run.client.tobytes(), run.server.tobytes()))
    assert digests[0] == digests[1]


def signs(half, device, k, size):
    return torch.from_numpy(SIGNS.signs(DirectionId(0, half, device, 0, 0, k), 0, size))


@torch.no_grad()
def test_zeroth_order_splitfed_of_any_method_is_a_configuration():
    hybrid = tiny_config(
        "method.server_order=first", "method.server_optimiser=Adam",
        "method.server_options={weight_decay=0.1}", "round.mode=asynchronous",
    )  # fmt: skip
    config = zo_splitfed(hybrid)
    check_config(config, "x")
    assert config.round.mode == "barrier"


def test_a_round_of_it_equals_splitfed_with_two_point_estimates_for_gradients(folder, experiment):
    """Written anew: replicas of both halves, averaged; both gradients are two-point estimates.

    Departures of the method, as documented: the client's sides are h + d/2 and h - d/2, at the
    server half after its step.
    """
    config = zo_splitfed(
        tiny_config(
            "run.rounds=1", "method.lam=0.02", "method.eta_c=0.05", "method.eta_s=0.05",
            "method.directions_client=2", "method.directions_server=2",
        )
    )  # fmt: skip
    run = play(experiment._replace(config=config), folder / "zo-step")
    model = build_model(config.model.name, 0, (64,)).module
    bench = Bench(Setting(config), experiment)
    w1, b1, w2, b2 = (p.detach() for p in model.parameters())
    client, server = torch.cat([w1.ravel(), b1]), torch.cat([w2.ravel(), b2])
    lam, eta = 0.02, 0.05

    def lower(flat, x):
        return torch.relu(x @ flat[:768].view(12, 64).T + flat[768:])

    def loss(flat, h, y):
        return cross_entropy(h @ flat[:120].view(10, 12).T + flat[120:], y)

    clients, servers = [], []
    for device in range(3):
        batch = bench.batch(device, 0)
        x, y = batch.xs[0], batch.labels
        h = lower(client, x)
        us = [signs(Stream.SERVER_HALF, device, k, len(server)) for k in (0, 1)]
        estimate = sum(
            (loss(server + lam * u, h, y) - loss(server - lam * u, h, y)) / (2 * lam) * u
            for u in us
        )
        stepped = server - eta * estimate / 2
        us = [signs(Stream.CLIENT_HALF, device, k, len(client)) for k in (0, 1)]
        estimate = torch.zeros_like(client)
        for u in us:
            d = lower(client + lam * u, x) - lower(client - lam * u, x)
            estimate += (loss(stepped, h + d / 2, y) - loss(stepped, h - d / 2, y)) / (2 * lam) * u
        clients.append(client - eta * estimate / 2)
        servers.append(stepped)
    assert_close(torch.from_numpy(run.client), sum(clients) / 3, atol=2e-6)
    assert_close(torch.from_numpy(run.server), sum(servers) / 3, atol=2e-6)
    assert float(np.abs(run.client - client.numpy()).max()) > 1e-3


# -- GAS

PLAIN_GAS = {
    "optimiser_options": {}, "clip_norm": 0.0, "local_iterations": 1, "generate": False,
    "logit_adjustment": False, "eta_c": 0.2, "eta_s": 0.3,
}  # fmt: skip


def test_gas_without_delay_and_generation_is_the_reference_step(benches):
    """All devices active, buffers as large, one iteration each: mini-batch SFL, but for this.

    A device steps on its own loss at the server half before the buffer's step. It is sent the
    global half of that moment: only the last to return finds the new average.
    """
    bench = benches("run.rounds=5")
    got, points = weights_after(bench, "gas", **PLAIN_GAS)
    central = Central(bench)
    size, flat = central.client_size, central.flat
    shares = [shard.samples / sum(s.samples for s in bench.shards) for shard in bench.shards]
    middle, server = flat[:size], flat[size:]
    starts = [middle] * 3
    for number, have in enumerate(got):
        gradients = [
            central.gradient(torch.cat([start, server]), [bench.batch(device, number)])
            for device, start in enumerate(starts)
        ]
        server = server - 0.3 * sum(gradient[size:] for gradient in gradients) / 3
        average = sum(
            share * (start - 0.2 * gradient[:size])
            for share, start, gradient in zip(shares, starts, gradients, strict=True)
        )
        assert_close(have, torch.cat([average, server]))
        starts, middle = [middle, middle, average], average
    assert [point.server_steps for point in points] == [1, 2, 3, 4, 5]
    assert points[0].client_forwards == 9


def test_logit_adjustment_changes_what_devices_learn_not_what_the_server_does(benches):
    bench = benches("run.rounds=1")
    plain, _ = weights_after(bench, "gas", **PLAIN_GAS)
    adjusted, _ = weights_after(bench, "gas", **{**PLAIN_GAS, "logit_adjustment": True})
    central = Central(bench)
    size = central.client_size
    assert_close(adjusted[-1][size:], plain[-1][size:])
    shares = [shard.samples / sum(s.samples for s in bench.shards) for shard in bench.shards]
    want = torch.zeros(size)
    for device, share in enumerate(shares):
        labels = bench.shards[device].y
        frequencies = torch.tensor([(labels == label).mean() for label in range(10)])
        batch = bench.batch(device, 0)
        loss = cross_entropy(central.model(batch.xs[0]) + (frequencies + 1e-12).log(), batch.labels)
        first = [*central.model.parameters()][:2]
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, first)])
        want += share * (central.flat[:size] - 0.2 * gradient)
    assert_close(adjusted[-1][:size], want)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_label_gaussians_hold_the_weighted_moments_of_all_that_came(covariance):
    torch.manual_seed(0)
    h = torch.randn(60, 3) @ torch.randn(3, 3) + torch.arange(60)[:, None] / 20
    labels, weights = torch.arange(60) % 2, torch.arange(1.0, 61.0)
    gaussians = LabelGaussians(3, covariance)
    for part in torch.arange(60).split(13):
        gaussians.update(h[part], labels[part], weights[part])
    assert not gaussians.complete
    for label in (0, 1):
        mask = labels == label
        mean = np.average(h[mask].numpy(), axis=0, weights=weights[mask].numpy())
        cov = np.cov(h[mask].numpy().T, aweights=weights[mask].numpy(), ddof=0)
        got_mean, got_cov = gaussians.moments(label)
        np.testing.assert_allclose(got_mean, mean, rtol=1e-4)
        want = cov if covariance == "full" else cov.diagonal()
        np.testing.assert_allclose(got_cov, want, rtol=1e-3, atol=1e-5)
    drawn = gaussians.sample(1, 4000, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.15)
    drawn_cov = np.cov(drawn.T)
    want = cov if covariance == "full" else np.diag(cov.diagonal())
    np.testing.assert_allclose(drawn_cov, want, atol=0.1 * np.abs(cov).max())


def test_a_gaussian_of_one_activation_can_be_sampled():
    gaussians = LabelGaussians(1, "full")
    gaussians.update(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    drawn = gaussians.sample(0, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, torch.ones(5, 4), rtol=0, atol=0.02)


def test_generation_makes_up_for_labels_that_no_active_device_has(benches):
    """Strong skew, few active devices: the filled-up buffer is the better teacher."""
    overrides = ["data.alpha=0.1", "devices.count=8", "devices.participants=2", "run.rounds=15"]
    options = {"eta_c": 0.05, "eta_s": 0.05, "local_iterations": 5, "optimiser_options": {}}
    scores = {}
    for generate in (False, True):
        bench = benches(*overrides)
        _, points = weights_after(bench, "gas", generate=generate, **options)
        scores[generate] = np.mean([point.accuracy for point in points[-5:]])
    assert scores[True] > scores[False]


class Slow(Instant):
    """Device 0 takes ten seconds a forward, the others one; a server step takes a tenth."""

    server_step_s = 0.1

    def for_forwards(self, device, number, forwards, *, begun=False):  # noqa: ARG002
        return forwards * (10.0 if device == 0 else 1.0)

    def up_s(self, device, size_bytes):  # noqa: ARG002
        return 1e-4 * size_bytes


class Waiting(Instant):
    """Before a device computes it waits five seconds; nothing else takes time."""

    def for_forwards(self, device, number, forwards, *, begun=False):  # noqa: ARG002
        return 0.0 if begun else 5.0


@pytest.mark.parametrize(
    ("name", "options"),
    [("splitfed_v1", {}), ("fedavg", {"local_steps": 3}), ("first_order_client", {})],
)
def test_what_a_device_waits_for_before_its_work_is_paid_once(benches, name, options):
    bench = benches("run.rounds=2", "evaluation.every=1", delays=Waiting(), server="parallel")
    points = run_baseline(name, bench, options)
    assert [point.simulated_s for point in points] == [5.0, 10.0]


@pytest.mark.parametrize("order", ["first", "zeroth"])
def test_gas_does_not_wait_for_the_slow_device(benches, order):
    bench = benches("run.rounds=6", delays=Slow(), server="parallel")
    _, points = weights_after(bench, "gas", order=order, buffer=2)
    slow_s = 10.0 * 20 * (3 if order == "first" else 7)
    assert points[0].simulated_s < slow_s
    times = [point.simulated_s for point in points]
    assert times == sorted(times)
    assert points[-1].server_steps > 5 * 20 * 2 / 2


def test_zeroth_order_gas_learns(benches):
    bench = benches("run.rounds=6", "method.lam=0.001", "method.directions_server=8")
    options = {"eta_c": 0.02, "eta_s": 0.05, "optimiser_options": {}}
    _, points = weights_after(bench, "gas", order="zeroth", **options)
    assert points[-1].loss < 0.9 * points[0].loss


# -- first-order and frozen clients


def test_the_first_order_client_takes_the_pooled_gradient_after_the_servers_steps(benches):
    bench = benches()
    options = {"server_optimiser": "SGD", "eta_s": 0.3, "eta_c": 0.2, "tau": 2}
    got, points = weights_after(bench, "first_order_client", **options)
    central = Central(bench)
    size, flat = central.client_size, central.flat
    for number, have in enumerate(got):
        batches = [bench.batch(device, number) for device in range(3)]
        client, server = flat[:size], flat[size:]
        for _ in range(2):
            both = torch.cat([client, server])
            server = server - 0.3 * central.gradient(both, batches)[size:]
        gradient = central.gradient(torch.cat([client, server]), batches)[:size]
        flat = torch.cat([client - 0.2 * gradient, server])
        assert_close(have, flat)
    assert points[0].server_steps == 2
    assert points[0].client_forwards == 9


def test_the_frozen_client_sends_activations_and_nothing_else(benches):
    bench = benches()
    got, points = weights_after(bench, "frozen_client")
    size = Central(bench).client_size
    assert torch.equal(got[-1][:size], got[0][:size])
    assert not torch.equal(got[-1][size:], got[0][size:])
    assert points[-1].bytes_down == 0
    assert points[0].bytes_up == 3 * (HEADER_BYTES + 8 * 12 * 4 + 8)
    assert points[0].client_forwards == 3
    upper = benches()
    zero = {"eta_c": 0.0}
    assert weights_after(upper, "first_order_client", **zero)[1] == points


# -- clocks


def test_a_serial_server_makes_devices_queue():
    trips = [Trip(1.0, [Leg(1.0, 0.5), Leg(1.0, 0.5)], 2.0), Trip(0.0, [Leg(2.0, 0.0)], 0.0)]
    # Alone the first takes 1 + 2 x (1 + 3 + 0.5) + 2.
    assert parallel_s(trips, 3.0) == 12.0
    # Served at 2-5 (first), 5-8 (second), 6.5 -> 8-11 (first again).
    assert serial_s(trips, 3.0) == 13.5
    # In turn: 2-5, 6.5-9.5 (first), 9.5-12.5 (second).
    assert in_turn_s(trips, 3.0) == 12.5
    assert in_turn_s(trips[::-1], 3.0) == max(2.0 + 3.0, 5.0 + 3.0 + 1.5 + 3.0 + 0.5 + 2.0)


def test_a_synchronous_round_waits_for_the_slowest(benches):
    frame, size_bytes = HEADER_BYTES + 8 * 12 * 4, 4 * (64 * 12 + 12)
    up_s = 1e-4 * (frame + 8 + size_bytes)
    for server, step_s in (("parallel", 0.1), ("serial", 0.1)):
        bench = benches(delays=Slow(), server=server)
        _, points = weights_after(bench, "splitfed_v1")
        assert points[0].simulated_s == pytest.approx(30.0 + step_s + up_s)
    bench = benches(delays=Slow(), server="serial")
    _, points = weights_after(bench, "first_order_client", tau=3)
    # Pooled: nothing begins before the last activation; three batches a step, and the gradients.
    assert points[0].simulated_s == pytest.approx(30.0 + 4 * 3 * 0.1 + up_s)
    _, points = weights_after(benches(delays=Slow(), server="parallel"), "frozen_client", tau=3)
    assert points[0].simulated_s == pytest.approx(10.0 + 3 * 0.1 + 1e-4 * (frame + 8))


# -- all


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_a_baseline_repeats_to_the_bit_and_learns(benches, name):
    overrides = ["run.rounds=8", "data.alpha=0.0", "devices.batch=32", "evaluation.every=2"]
    runs = []
    for _ in range(2):
        bench = benches(*overrides, delays=Slow())
        options = {"local_iterations": 4} if name == "gas" else {}
        runs.append(weights_after(bench, name, **options))
    (first, points), (again, same) = runs
    assert points == same
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [point.round for point in points] == [2, 4, 6, 8]
    assert points[-1].loss < points[0].loss
    # A round is a batch of each device; of GAS, four of each place, and what is under way.
    batches = points[-1].client_batches
    assert batches >= 8 * 3 * 4 if name == "gas" else batches == 8 * 3


def test_a_diverged_run_ends_early(benches):
    bench = benches("run.rounds=50")
    _, points = weights_after(bench, "splitfed_v1", eta_c=1e20, eta_s=1e20)
    assert len(points) < 50
    assert not np.isfinite(points[-1].loss)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("splitfed", {}, "splitfed_v1"),
        ("gas", {"buffers": 3}, "buffers"),
        ("fedavg", {"eta_c": 1.0}, "eta_c"),
        ("splitfed_v1", {"eta_c": -1.0}, "eta_c"),
        ("splitfed_v1", {"optimiser": "LBFGS"}, "torch.optim"),
        ("splitfed_v1", {"optimiser": "Adamant"}, "torch.optim"),
        ("splitfed_v1", {"optimiser_options": {"speed": 1.0}}, "speed"),
        ("frozen_client", {"eta_c": 1.0}, "eta_c"),
    ],
)
def test_what_a_baseline_does_not_know_is_refused(benches, name, options, told):
    with pytest.raises(StudyError, match=told) as refused:
        run_baseline(name, benches(), options)
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)
