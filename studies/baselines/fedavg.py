"""Federated averaging of the whole model, first order: nothing is split.

Source: McMahan, Moore, Ramage, Hampson & Aguera y Arcas, "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017, arXiv 1602.05629, algorithm 1 (FedAvg).

Departures: a device makes `local_steps` steps on the batches that our method would draw, not E
passes over its shard. Other optimisers than the source's plain SGD are allowed; their state stays
with the device. Work is counted in forwards of the device half, converted by FLOPs. The server
only averages, which takes no time.
"""

from __future__ import annotations

from msgspec import field
from torch.nn.functional import cross_entropy

from server_node.sections import AtLeast1, NotNegative
from studies.baselines.options import OptimiserOptions, Options, Stepper, Weighting
from studies.harness import BACKWARD, FORWARD, Bench, Meter, Point, mean_weights


class FedAvgOptions(Options, frozen=True):
    """The step size is multiplied by method.schedule."""

    eta: NotNegative = 0.1
    optimiser: str = "SGD"  # a class of torch.optim
    optimiser_options: OptimiserOptions = field(default_factory=dict)
    local_steps: AtLeast1 = 1  # batches of a device in a round
    weighting: Weighting = "samples"


def fedavg(bench: Bench, options: FedAvgOptions) -> list[Point]:
    """Whole models on the devices, averaged each round."""
    meter, delays = Meter(bench), bench.setting.delays
    halves = bench.halves()
    client, server = halves
    name, given = options.optimiser, options.optimiser_options
    steppers = [Stepper(half, name, given, options.eta) for half in halves]
    weights = [half.flat.clone() for half in halves]
    size_bytes = client.size_bytes + server.size_bytes
    forwards = (FORWARD + BACKWARD) * bench.whole_forwards
    for number in range(bench.config.run.rounds):
        devices = bench.participants(number)
        trained = []
        lasts_s = []
        for device in devices:
            for half, start in zip(halves, weights, strict=True):
                half.load(start)
            seconds = delays.down_s(device, size_bytes) + delays.up_s(device, size_bytes)
            for step in range(options.local_steps):
                drawn = number * options.local_steps + step
                batch = bench.batch(device, drawn)
                client.clear()
                server.clear()
                cross_entropy(server(client(*batch.xs)), batch.labels).backward()  # type: ignore[no-untyped-call]
                for stepper in steppers:
                    stepper.step(bench.factor(number), device)
                seconds += delays.for_forwards(device, drawn, forwards, begun=step > 0)
            trained.append([half.flat.clone() for half in halves])
            lasts_s.append(seconds)
        shares = bench.shares(devices, by_samples=options.weighting == "samples")
        weights = [mean_weights(flats, shares) for flats in zip(*trained, strict=True)]
        meter.now_s += max(lasts_s)
        meter.bytes_up += size_bytes * len(devices)
        meter.bytes_down += size_bytes * len(devices)
        batches = len(devices) * options.local_steps
        meter.client_batches += batches
        meter.client_forwards += forwards * batches
        if not meter.closed(number, *weights):
            break
    return meter.points
