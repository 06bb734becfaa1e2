"""GAS: asynchronous split federated learning with generated activations.

Source: Yang & Liu, "GAS: Generative Activation-Aided Asynchronous Split Federated Learning", AAAI
2025, arXiv 2409.01251, and the authors' code (github.com/eejiarong/GAS, GAS_main.py).

C of the devices are active. An active device makes E iterations, waiting for nobody: it sends h and
labels; the server answers with the gradient, at h, of its current loss with the logits adjusted by
the log of the device's label frequencies (Menon et al., arXiv 2007.07314); the device steps. The
activations also go into a buffer. When Q_s batches are there, they update a weighted Gaussian of
each label, every label is filled up to a batch with samples of its Gaussian (once all labels were
seen), and the server half steps on the lot, logits unadjusted. After E iterations the device's half
goes into a model buffer; Q_c halves are averaged, weighed by samples, to the next global one, which
closes a round here. Another device takes the free place, chosen at random among the idle.

Paper and code disagree; taken are: from the code momentum, weight decay, clipping of gradients, and
filling up to the batch size; from the paper weights n_k / n (the code averages evenly) and
s(n) = n, n = t E + e (the code's t grows faster). The code shares one momentum among all devices;
here an active device has its own and begins without. With all devices active a place is taken by
the device that left it. The technical appendix of the paper was not at hand.

`order = "zeroth"` is our conversion: MU-SplitFed (arXiv 2510.21155) compares with a zeroth-order
GAS and does not say how it was made. Here two-point estimates with the K, K_s and lam of the method
stand in for both gradients: the device sends h and K differences, and gets K scalars.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch
from torch.nn.functional import cross_entropy

from server_node.sections import AtLeast1, Count, NotNegative
from studies.baselines.label_gaussians import Covariance, LabelGaussians
from studies.baselines.options import OptimiserOptions, Options, Stepper
from studies.baselines.zeroth import TwoPoint
from studies.harness import BACKWARD, FORWARD, Batch, Bench, Meter, Point, mean_weights
from wire_protocol.directions import DirectionId, Stream, permutation
from wire_protocol.frames import FrameKind
from wire_protocol.messages import Scalars, encode

# A draw beside that of participants, whose device field is 0, and SplitFed's.
_REPLACEMENT = 2
_LOG_FLOOR = 1e-12  # the authors'


class GasOptions(Options, frozen=True):
    """Defaults are the authors'; step sizes are multiplied by method.schedule."""

    order: Literal["first", "zeroth"] = "first"
    eta_c: NotNegative = 0.01
    eta_s: NotNegative = 0.01
    optimiser: str = "SGD"  # a class of torch.optim, of both halves
    optimiser_options: OptimiserOptions = msgspec.field(
        default_factory=lambda: {"momentum": 0.9, "weight_decay": 5e-4}
    )
    clip_norm: NotNegative = 10.0  # of a half's gradient; 0: never
    local_iterations: AtLeast1 = 20  # E
    buffer: Count = 0  # Q_s = Q_c; 0: as many as devices are active
    generate: bool = True
    logit_adjustment: bool = True
    covariance: Covariance = "full"


class _Sent(NamedTuple):
    """What an active device has on its way, as the server will get it."""

    batch: Batch
    origin: DirectionId  # its draw: of the batch, and of the directions at k = 0
    h: torch.Tensor
    differences: list[torch.Tensor]
    size_bytes: int
    forwards: float  # that it took


@dataclass
class _Place:
    """One of the C places: an active device and its half."""

    device: int
    weights: torch.Tensor
    round: int  # t when it was chosen
    done: int = 0  # iterations e
    sent: _Sent | None = None


@dataclass
class _Buffers:
    """What waits at the server."""

    h: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)  # n of each batch
    models: list[torch.Tensor] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


def gas(bench: Bench, options: GasOptions) -> list[Point]:
    """Run it until the model buffer was full run.rounds times."""
    return _Gas(bench, options).run()


class _Gas:
    def __init__(self, bench: Bench, options: GasOptions) -> None:
        self._bench, self._options, self._meter = bench, options, Meter(bench)
        config = bench.config
        self._method, self._seed = config.method, config.run.seed
        self._capacity = options.buffer or config.participants
        self._client, self._server = bench.halves()
        self._global = self._client.flat.clone()
        name, given, clip = options.optimiser, options.optimiser_options, options.clip_norm
        self._client_stepper = Stepper(self._client, name, given, options.eta_c, clip)
        self._server_stepper = Stepper(self._server, name, given, options.eta_s, clip)
        self._client_sides = TwoPoint(self._client, self._method.lam)
        self._server_sides = TwoPoint(self._server, self._method.lam)
        self._gaussians = LabelGaussians(bench.classes, options.covariance)
        self._generator = torch.Generator().manual_seed(self._seed)
        self._buffers = _Buffers()
        self._adjustments: dict[int, torch.Tensor] = {}
        self._drawn = [0] * len(bench.shards)  # batches of each device so far
        self._round = self._draws = 0
        self._free_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self._active: set[int] = set()
        self._diverged = False

    def run(self) -> list[Point]:
        for device in self._bench.participants(0):
            self._choose(device, 0.0)
        while self._round < self._bench.config.run.rounds and not self._diverged:
            self._meter.now_s, _, happen = heapq.heappop(self._events)
            happen()
        return self._meter.points

    def _at(self, when_s: float, happen: Callable[[], None]) -> None:
        """Events of the same time happen in the order in which they were foreseen."""
        heapq.heappush(self._events, (when_s, self._scheduled, happen))
        self._scheduled += 1

    # -- devices -----------------------------------------------------------------------------

    def _choose(self, device: int, now_s: float) -> None:
        """A device becomes active and gets the current global half."""
        self._active.add(device)
        self._client_stepper.forget(device)
        place = _Place(device, self._global.clone(), self._round)
        size_bytes = self._client.size_bytes
        self._meter.bytes_down += size_bytes
        self._compute(place, now_s + self._bench.setting.delays.down_s(device, size_bytes))

    def _compute(self, place: _Place, now_s: float) -> None:
        """The device's forwards, and its frames on their way."""
        bench, delays = self._bench, self._bench.setting.delays
        number = self._drawn[place.device]
        self._drawn[place.device] += 1
        origin = DirectionId(self._seed, Stream.CLIENT_HALF, place.device, number, 0, 0)
        batch = bench.batch(place.device, number)
        self._client.load(place.weights)
        with torch.no_grad():
            h, size_bytes = bench.carry(FrameKind.ACTIVATION, self._client(*batch.xs), batch.labels)
        differences, forwards = [], FORWARD
        if self._options.order == "zeroth":
            for k in range(self._method.directions_client):
                plus, minus = self._client_sides.both_sides(
                    origin._replace(k=k), lambda: self._client(*batch.xs)
                )
                differences.append(plus - minus)
            tensor, more = bench.carry(FrameKind.DIFFERENCES, torch.stack(differences))
            differences = [*tensor]
            size_bytes += more
            forwards += 2 * len(differences)
        place.sent = _Sent(batch, origin, h, differences, size_bytes, forwards)
        arrival_s = now_s + delays.for_forwards(place.device, number, forwards)
        arrival_s += delays.up_s(place.device, size_bytes)
        self._at(arrival_s, lambda: self._arrived(place, arrival_s))

    def _step(self, place: _Place, sent: _Sent, gradient: torch.Tensor | list[float]) -> float:
        """The device's step by what the server answered; forwards it takes."""
        client = self._client
        client.load(place.weights)
        client.clear()
        backward = isinstance(gradient, torch.Tensor)
        if isinstance(gradient, torch.Tensor):
            h = client(*sent.batch.xs)
            if h.requires_grad:  # not of a half without parameters
                h.backward(gradient)  # type: ignore[no-untyped-call]
        else:
            client.set_gradient(self._client_sides.gradient(sent.origin, gradient))
        self._client_stepper.step(self._bench.factor(self._round), place.device)
        place.weights.copy_(client.flat)
        return BACKWARD if backward else 0.0

    # -- server ------------------------------------------------------------------------------

    def _served_s(self, now_s: float) -> float:
        """When a step that is asked for now is done."""
        step_s = self._bench.setting.delays.server_step_s
        if self._bench.setting.server == "parallel":
            return now_s + step_s
        self._free_s = max(self._free_s, now_s) + step_s
        return self._free_s

    def _arrived(self, place: _Place, now_s: float) -> None:
        """Frames of an active device: answer, buffer, and step when the buffer is full."""
        delays, device = self._bench.setting.delays, place.device
        sent = place.sent
        assert sent is not None
        place.done += 1
        answer, size_bytes = self._answer(device, sent)
        self._meter.bytes_up += sent.size_bytes
        self._meter.bytes_down += size_bytes
        now_s = self._served_s(now_s) + delays.down_s(device, size_bytes)
        backward = self._step(place, sent, answer)
        self._meter.client_forwards += sent.forwards + backward
        self._meter.client_batches += 1
        now_s += delays.for_forwards(device, sent.origin.round, backward, begun=True)
        self._buffer(place, sent)
        if place.done < self._options.local_iterations:
            self._compute(place, now_s)
            return
        back_s = now_s + delays.up_s(device, self._client.size_bytes)
        self._at(back_s, lambda: self._returned(place, back_s))

    def _answer(self, device: int, sent: _Sent) -> tuple[torch.Tensor | list[float], int]:
        """The gradient at h, or K scalars, and their bytes on the wire."""
        labels = sent.batch.labels

        def loss(h: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self._server(h) + self._adjustment(device), labels)

        if self._options.order == "first":
            leaf = sent.h.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf), leaf)
            return self._bench.carry(FrameKind.ACTIVATION, gradient)
        with torch.no_grad():
            deltas = [float(loss(sent.h + d / 2) - loss(sent.h - d / 2)) for d in sent.differences]
        data = np.array(deltas, "<f4").tobytes()
        return deltas, len(encode(Scalars(0, sent.origin.round, data)))

    def _adjustment(self, device: int) -> torch.Tensor:
        """Log of the device's label frequencies, (classes,); zeros without adjustment."""
        if device not in self._adjustments:
            labels = self._bench.shards[device].y
            counts = np.bincount(labels, minlength=self._bench.classes)
            logs = np.log(counts / counts.sum() + _LOG_FLOOR) * self._options.logit_adjustment
            self._adjustments[device] = torch.from_numpy(logs).float().to(self._bench.device)
        return self._adjustments[device]

    def _buffer(self, place: _Place, sent: _Sent) -> None:
        buffers = self._buffers
        buffers.h.append(sent.h)
        buffers.labels.append(sent.batch.labels)
        buffers.progress.append(place.round * self._options.local_iterations + place.done)
        if len(buffers.h) < self._capacity:
            return
        h, labels = torch.cat(buffers.h), torch.cat(buffers.labels)
        counts = [len(part) for part in buffers.labels]
        buffers.h, buffers.labels = [], []
        if self._options.generate:
            weights = np.repeat(np.array(buffers.progress, np.float32), counts)
            self._gaussians.update(
                h.flatten(1), labels, torch.from_numpy(weights).to(self._bench.device)
            )
            if self._gaussians.complete:
                h, labels = self._filled_up(h, labels)
        buffers.progress = []
        self._served_s(self._meter.now_s)
        self._server_step(h, labels)

    def _filled_up(
        self, h: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with generated activations, a batch of every label at least."""
        have = torch.bincount(labels, minlength=self._bench.classes).tolist()
        missing = [max(0, self._bench.config.devices.batch - count) for count in have]
        drawn = [
            self._gaussians.sample(label, count, self._generator).view(count, *h.shape[1:])
            for label, count in enumerate(missing)
            if count
        ]
        classes = torch.arange(self._bench.classes, device=labels.device)
        more = classes.repeat_interleave(torch.tensor(missing, device=labels.device))
        return torch.cat([h, *drawn]), torch.cat([labels, more])

    def _server_step(self, h: torch.Tensor, labels: torch.Tensor) -> None:
        server = self._server
        server.clear()
        if self._options.order == "first":
            cross_entropy(server(h), labels).backward()  # type: ignore[no-untyped-call]
        else:
            number = self._meter.server_steps
            origin = DirectionId(self._seed, Stream.SERVER_HALF, 0, number, 0, 0)
            deltas = []
            for k in range(self._method.directions_server):
                plus, minus = self._server_sides.both_sides(
                    origin._replace(k=k), lambda: cross_entropy(server(h), labels)
                )
                deltas.append(float(plus - minus))
            server.set_gradient(self._server_sides.gradient(origin, deltas))
        self._server_stepper.step(self._bench.factor(self._round))
        self._meter.server_steps += 1

    def _returned(self, place: _Place, now_s: float) -> None:
        """A device half after its E iterations: average when the buffer is full, choose anew."""
        buffers, bench = self._buffers, self._bench
        self._meter.bytes_up += self._client.size_bytes
        buffers.models.append(place.weights)
        buffers.owners.append(place.device)
        if len(buffers.models) == self._capacity:
            shares = bench.shares(buffers.owners, by_samples=True)
            self._global = mean_weights(buffers.models, shares)
            buffers.models, buffers.owners = [], []
            self._diverged = not self._meter.closed(self._round, self._global, self._server.flat)
            self._round += 1
        idle = [d for d in range(len(bench.shards)) if d not in self._active] or [place.device]
        draw = DirectionId(self._seed, Stream.PARTICIPATION, _REPLACEMENT, self._draws, 0, 0)
        self._draws += 1
        self._active.discard(place.device)
        self._choose(idle[permutation(draw, len(idle))[0]], now_s)
