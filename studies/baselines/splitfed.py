"""SplitFed, versions 1 and 2, first order.

Source: Thapa, Chamikara, Camtepe & Sun, "SplitFed: When Federated Learning Meets Split Learning",
AAAI 2022, arXiv 2004.12088, algorithms 1 and 2, and the authors' code
(github.com/chandra2thapa/SplitFed-When-Federated-Learning-Meets-Split-Learning, SFLV1, SFLV2).

Version 1: every device has its own replica of the server half; after a round both halves are
averaged. Version 2: one server half serves the devices one after the other, in a random order;
the device halves alone are averaged.

Departures: a round is `local_steps` batches of a device, not a pass over its shard; the batches
and participants are those of our method. An optimiser's state stays with its device from round to
round (the authors' code begins with a new Adam at every batch), in version 2 the server's with the
server. Averages are weighed n_k / n as in algorithm 1; the code weighs all alike (`weighting`).
Normalisation layers keep their statistics, as in every half here.
"""

from __future__ import annotations

from msgspec import field
from torch.nn.functional import cross_entropy

from server_node.sections import AtLeast1, NotNegative
from studies.baselines.options import OptimiserOptions, Options, Stepper, Weighting
from studies.harness import (
    BACKWARD,
    FORWARD,
    Batch,
    Bench,
    Meter,
    Point,
    TorchHalf,
    mean_weights,
)
from studies.timeline import Leg, Trip, in_turn_s
from wire_protocol.directions import DirectionId, Stream, permutation
from wire_protocol.frames import FrameKind

# Beside the draw of participants, whose device field is 0.
_ORDER = 1


class SplitFedOptions(Options, frozen=True):
    """Step sizes are multiplied by method.schedule."""

    eta_c: NotNegative = 0.1
    eta_s: NotNegative = 0.1
    optimiser: str = "SGD"  # a class of torch.optim, of both halves
    optimiser_options: OptimiserOptions = field(default_factory=dict)
    local_steps: AtLeast1 = 1  # batches of a device in a round
    weighting: Weighting = "samples"


def splitfed_v1(bench: Bench, options: SplitFedOptions) -> list[Point]:
    """A server replica for each device, averaged."""
    return _SplitFed(bench, options, one_server=False).run()


def splitfed_v2(bench: Bench, options: SplitFedOptions) -> list[Point]:
    """One server half, device after device."""
    return _SplitFed(bench, options, one_server=True).run()


class _SplitFed:
    def __init__(self, bench: Bench, options: SplitFedOptions, *, one_server: bool) -> None:
        self._bench, self._options, self._one_server = bench, options, one_server
        self._meter = Meter(bench)
        self._client, self._server = bench.halves()
        name, given = options.optimiser, options.optimiser_options
        self._client_stepper = Stepper(self._client, name, given, options.eta_c)
        self._server_stepper = Stepper(self._server, name, given, options.eta_s)

    def run(self) -> list[Point]:
        bench, meter = self._bench, self._meter
        client, server = self._client.flat.clone(), self._server.flat.clone()
        for number in range(bench.config.run.rounds):
            devices = bench.participants(number)
            if self._one_server:
                devices = shuffled(bench, devices, number)
            trips, clients, servers = [], [], []
            for device in devices:
                self._client.load(client)
                if not self._one_server:
                    self._server.load(server)
                trips.append(self._device(device, number))
                clients.append(self._client.flat.clone())
                servers.append(self._server.flat.clone())
            shares = bench.shares(devices, by_samples=self._options.weighting == "samples")
            client = mean_weights(clients, shares)
            server = servers[-1] if self._one_server else mean_weights(servers, shares)
            step_s = bench.setting.delays.server_step_s
            meter.now_s += in_turn_s(trips, step_s) if self._one_server else bench.round_s(trips)
            if not meter.closed(number, client, server):
                break
        return meter.points

    def _device(self, device: int, number: int) -> Trip:
        """All batches of one device in a round; its weights are those of the halves."""
        bench, meter, delays = self._bench, self._meter, self._bench.setting.delays
        legs = []
        for step in range(self._options.local_steps):
            drawn = number * self._options.local_steps + step
            self._client.clear()
            self._server.clear()
            up, down = split_backward(bench, self._client, self._server, bench.batch(device, drawn))
            factor = bench.factor(number)
            self._server_stepper.step(factor, -1 if self._one_server else device)
            self._client_stepper.step(factor, device)
            meter.bytes_up += up
            meter.bytes_down += down
            meter.client_forwards += FORWARD + BACKWARD
            meter.server_steps += 1
            meter.client_batches += 1
            legs.append(
                Leg(
                    delays.for_forwards(device, drawn, FORWARD) + delays.up_s(device, up),
                    delays.down_s(device, down)
                    + delays.for_forwards(device, drawn, BACKWARD, begun=True),
                )
            )
        size_bytes = self._client.size_bytes
        meter.bytes_up += size_bytes
        meter.bytes_down += size_bytes
        return Trip(delays.down_s(device, size_bytes), legs, delays.up_s(device, size_bytes))


def split_backward(
    bench: Bench, client: TorchHalf, server: TorchHalf, batch: Batch
) -> tuple[int, int]:
    """Add the batch's gradients to both halves, through the wire; bytes up and down."""
    h = client(*batch.xs)
    received, up = bench.carry(FrameKind.ACTIVATION, h, batch.labels)
    leaf = received.requires_grad_()
    cross_entropy(server(leaf), batch.labels).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    gradient, down = bench.carry(FrameKind.ACTIVATION, leaf.grad)
    if h.requires_grad:  # not of a half without parameters
        h.backward(gradient)  # type: ignore[no-untyped-call]
    return up, down


def shuffled(bench: Bench, devices: list[int], number: int) -> list[int]:
    """The devices of a round in a seeded random order."""
    draw = DirectionId(bench.config.run.seed, Stream.PARTICIPATION, _ORDER, number, 0, 0)
    return [devices[i] for i in permutation(draw, len(devices))]
