"""Our hybrid with a first-order client, its upper bound; with eta_c = 0 its lower bound.

Source: the method of this project with server_order = "first", server_batch = "pooled" and
feedback = "cut_gradient" (docs/baselines.md), whose zeroth-order client is replaced by backprop.

A round: devices send h and labels. The server makes tau steps on the batch pooled of all
participants, then sends each the gradient of its own mean loss at h. Devices backpropagate and
send the gradient of their half; the step is taken once, on the mean over devices, and the weights
go down at the beginning of a round. A frozen client sends h alone and gets nothing.

What a zeroth-order client adds over the frozen one can be set against what this one adds.
"""

from __future__ import annotations

import torch
from msgspec import field
from torch.nn.functional import cross_entropy

from server_node.sections import AtLeast1, NotNegative
from studies.baselines.options import OptimiserOptions, Options, Stepper
from studies.harness import BACKWARD, FORWARD, Batch, Bench, Meter, Point, TorchHalf
from wire_protocol.frames import FrameKind


class FrozenClientOptions(Options, frozen=True):
    """Step sizes are multiplied by method.schedule."""

    eta_s: NotNegative = 3e-3
    server_optimiser: str = "Adam"  # a class of torch.optim
    server_options: OptimiserOptions = field(default_factory=dict)
    tau: AtLeast1 = 4  # server steps on a round's pooled batch


class FirstOrderClientOptions(FrozenClientOptions, frozen=True):
    """The frozen client's, and the client's own."""

    eta_c: NotNegative = 0.1  # 0: frozen
    client_optimiser: str = "SGD"
    client_options: OptimiserOptions = field(default_factory=dict)


def frozen_client(bench: Bench, options: FrozenClientOptions) -> list[Point]:
    """The lower bound: the client half keeps its initial weights."""
    shared = {name: getattr(options, name) for name in options.__struct_fields__}
    return first_order_client(bench, FirstOrderClientOptions(**shared, eta_c=0.0))


def first_order_client(bench: Bench, options: FirstOrderClientOptions) -> list[Point]:
    """The upper bound: the client half learns by backpropagation."""
    meter, learns = Meter(bench), options.eta_c > 0
    client, server = bench.halves()
    server_stepper = Stepper(
        server, options.server_optimiser, options.server_options, options.eta_s
    )
    client_stepper = Stepper(
        client, options.client_optimiser, options.client_options, options.eta_c
    )
    for number in range(bench.config.run.rounds):
        devices = bench.participants(number)
        factor = bench.factor(number)
        batches = [bench.batch(device, number) for device in devices]
        with torch.set_grad_enabled(learns):
            hs = [client(*batch.xs) for batch in batches]
        carried = [
            bench.carry(FrameKind.ACTIVATION, h, batch.labels)
            for h, batch in zip(hs, batches, strict=True)
        ]
        received = [tensor for tensor, _ in carried]
        pooled, labels = torch.cat(received), torch.cat([batch.labels for batch in batches])
        for _ in range(options.tau):
            server.clear()
            cross_entropy(server(pooled), labels).backward()  # type: ignore[no-untyped-call]
            server_stepper.step(factor)
        downs = [0] * len(devices)
        if learns:
            client.clear()
            downs = _backpropagate(bench, server, hs, received, batches)
            client_stepper.step(factor)
        meter.server_steps += options.tau
        meter.client_batches += len(devices)
        meter.client_forwards += len(devices) * (FORWARD + (BACKWARD if learns else 0))
        ups = [size for _, size in carried]
        size_bytes = client.size_bytes if learns else 0
        meter.bytes_up += sum(ups) + len(devices) * size_bytes
        meter.bytes_down += sum(downs) + len(devices) * size_bytes
        meter.now_s += _lasts_s(bench, options.tau, number, devices, ups, downs, size_bytes)
        if not meter.closed(number, client.flat, server.flat):
            break
    return meter.points


def _backpropagate(
    bench: Bench, server: TorchHalf, hs: list[torch.Tensor], received: list[torch.Tensor],
    batches: list[Batch],
) -> list[int]:  # fmt: skip
    """Leave the mean of the devices' gradients in the client half; bytes down of each."""
    downs = []
    for h, tensor, batch in zip(hs, received, batches, strict=True):
        leaf = tensor.detach().requires_grad_()
        loss = cross_entropy(server(leaf), batch.labels)
        (at_cut,) = torch.autograd.grad(loss, leaf)
        gradient, down = bench.carry(FrameKind.ACTIVATION, at_cut)
        downs.append(down)
        if h.requires_grad:  # not of a half without parameters
            h.backward(gradient / len(hs))  # type: ignore[no-untyped-call]
    return downs


def _lasts_s(
    bench: Bench, tau: int, number: int, devices: list[int], ups: list[int], downs: list[int],
    size_bytes: int,
) -> float:  # fmt: skip
    """A round's seconds; the server starts when the last activation is there.

    It works on the devices' batches one after the other, or at once: tau steps, and the gradients.
    """
    delays = bench.setting.delays
    arrival_s = max(
        delays.down_s(device, size_bytes) * bool(size_bytes)
        + delays.for_forwards(device, number, FORWARD)
        + delays.up_s(device, up)
        for device, up in zip(devices, ups, strict=True)
    )
    batches = 1 if bench.setting.server == "parallel" else len(devices)
    work_s = (tau + bool(size_bytes)) * batches * delays.server_step_s
    if not size_bytes:
        return arrival_s + work_s
    return (
        arrival_s
        + work_s
        + max(
            delays.down_s(device, down)
            + delays.for_forwards(device, number, BACKWARD, begun=True)
            + delays.up_s(device, size_bytes)
            for device, down in zip(devices, downs, strict=True)
        )
    )
