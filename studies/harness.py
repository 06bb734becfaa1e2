"""What every baseline is run on: the method's model, data, shards, batches, wire and test set.

The device side of a baseline is torch, with gradients: an emulation that no board could run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from msgspec import Struct
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edge_client.shard import Shard
from emulation.inprocess import make_shards
from server_node.config import Config
from server_node.flat import bind
from server_node.prepare import Experiment, open_half, prepare
from server_node.schedule import step_factor
from server_node.torch_half import Scores
from studies.errors import StudyError
from studies.timeline import Instant, Timing, Trip, parallel_s, serial_s
from wire_protocol.directions import batch_indices, participants
from wire_protocol.frames import Frame, FrameKind, decode_frame, encode_frame
from wire_protocol.manifest import prepare_inputs

# Of a device's work: a forward and a backward pass together count as three forwards.
FORWARD: Final = 1.0
BACKWARD: Final = 2.0
_NO_LABELS = np.empty(0, np.uint32)
Advanced = Callable[[int], None]  # is told the rounds done


class Setting(Struct, frozen=True):
    """What all arms of a comparison share.

    Of `config` the model, data, devices, wire, seed, rounds, schedule and evaluation count; of the
    method only what a baseline's own options name.
    """

    config: Config
    delays: Timing = Instant()
    server: Literal["serial", "parallel"] = "serial"  # one batch at a time, or all that wait


class Point(Struct, frozen=True):
    """State after `round` rounds; counts are sums over all devices since the start."""

    round: int
    simulated_s: float
    accuracy: float
    loss: float
    bytes_up: int
    bytes_down: int
    client_forwards: float  # of the device half on a batch; a backward pass counts two
    server_steps: int  # of the server half's weights
    client_batches: int  # that devices learnt from, or had pooled


class Batch(NamedTuple):
    """A device's batch on the torch device: xs[input] (batch, *input shape), labels (batch,)."""

    xs: list[torch.Tensor]
    labels: torch.Tensor


class TorchHalf:
    """A copy of a half with gradients; its parameters are views of `flat` (d,)."""

    def __init__(self, module: nn.Module, flat: torch.Tensor) -> None:
        self.module, self.flat = module, flat
        bind(module, flat)
        self.parameters = [*module.parameters()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __call__(self, *xs: torch.Tensor) -> torch.Tensor:
        """The half's output; the first layer may work in place, so it gets copies."""
        output: torch.Tensor = self.module(*(x.clone() for x in xs))
        return output

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def set_gradient(self, gradient: torch.Tensor) -> None:
        """Make parts of `gradient` (d,) the parameters' gradients."""
        offset = 0
        for parameter in self.parameters:
            size = parameter.numel()
            parameter.grad = gradient[offset : offset + size].view(parameter.shape).clone()
            offset += size

    def load(self, flat: torch.Tensor) -> None:
        """Take over weights (d,)."""
        self.flat.copy_(flat)

    @property
    def size_bytes(self) -> int:
        """Of the weights on the wire, as float32."""
        return self.flat.numel() * 4


class Bench:
    """A setting with everything loaded; baselines do not change it."""

    def __init__(
        self, setting: Setting, experiment: Experiment,
        advanced: Advanced = lambda _: None,
    ) -> None:  # fmt: skip
        """`experiment` is the one that runs of the method use; `advanced` hears of rounds done."""
        self.setting, self.config, self.advanced = setting, setting.config, advanced
        exported = experiment.exported
        self.classes = exported.halves.classes
        self.activation_shape = exported.halves.activation_shape
        self._inputs = exported.manifest.inputs
        self._evaluator = experiment.evaluator
        # Copies: the evaluation writes its own weights into the modules.
        halves = exported.halves
        self._modules = copy.deepcopy((halves.client.module, halves.server.module))
        self._weights = experiment.client.initial_parameters(), experiment.server_weights
        self._half = open_half(experiment)
        self.device = torch.device(self.config.server.device)
        self.shards: list[Shard] = make_shards(self.config)
        self._frame_bytes: dict[tuple[FrameKind, tuple[int, ...], int], int] = {}
        self._whole_forwards: float | None = None

    def halves(self) -> tuple[TorchHalf, TorchHalf]:
        """Fresh copies of the device half and the server half, with the initial weights."""
        client, server = (
            TorchHalf(module.to(self.device), torch.from_numpy(flat.copy()).to(self.device))
            for module, flat in zip(copy.deepcopy(self._modules), self._weights, strict=True)
        )
        return client, server

    def batch(self, device: int, number: int) -> Batch:
        """The batch that a device of the method draws in round `number`."""
        shard, seed = self.shards[device], self.config.run.seed
        chosen = batch_indices(seed, device, number, self.config.devices.batch, shard.samples)
        xs = prepare_inputs([x[chosen] for x in shard.xs], self._inputs)
        return Batch(
            [torch.from_numpy(x).to(self.device) for x in xs],
            torch.from_numpy(shard.y[chosen]).to(self.device),
        )

    def participants(self, number: int) -> list[int]:
        """The devices, ascending, that take part in a round of the method."""
        everybody = list(range(len(self.shards)))
        return participants(self.config.run.seed, number, everybody, self.config.participants)

    def shares(self, devices: Sequence[int], *, by_samples: bool) -> list[float]:
        """Weights, summing to 1, of devices in an average: n_k / n, or equal."""
        counts = [self.shards[d].samples if by_samples else 1 for d in devices]
        return [count / sum(counts) for count in counts]

    def factor(self, number: int) -> float:
        """What multiplies step sizes in a round: method.schedule."""
        return step_factor(self.config.method.schedule, number, self.config.run.rounds)

    def scores(self, client: torch.Tensor, server: torch.Tensor) -> Scores:
        """Loss and accuracy on the test set, as for a run, of weights (d_c,) and (d_s,)."""
        self._half.load(server.detach().cpu().numpy())
        return self._evaluator.scores(client.detach().cpu().numpy(), self._half)

    def carry(
        self, kind: FrameKind, tensor: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """A tensor as the other side gets it from the wire, and the bytes of its frame.

        Gradients have no kind of their own: they go as activations without labels.
        """
        wire = self.config.wire
        have = _NO_LABELS if labels is None else labels.cpu().numpy().astype(np.uint32)
        key = (kind, tuple(tensor.shape), have.size)
        plain = wire.encoding == "float32" and wire.compression == "none"
        if plain and key in self._frame_bytes:
            return tensor.detach(), self._frame_bytes[key]
        array = tensor.detach().cpu().numpy()
        data = encode_frame(
            Frame(kind, 0, 0, 0, 0, array, have, wire.encoding),
            compressed=wire.compression == "zstd",
        )
        if plain:
            self._frame_bytes[key] = len(data)
            return tensor.detach(), len(data)
        received = np.array(decode_frame(data).tensor)
        return torch.from_numpy(received).to(self.device), len(data)

    def round_s(self, trips: Sequence[Trip]) -> float:
        """Until the last device of a synchronous round is through."""
        lasts = parallel_s if self.setting.server == "parallel" else serial_s
        return lasts(trips, self.setting.delays.server_step_s)

    @property
    def whole_forwards(self) -> float:
        """What a forward of the whole model costs in forwards of the device half, by FLOPs."""
        if self._whole_forwards is None:
            client, server = self.halves()
            flops = _flops(client, server, self.batch(0, 0).xs)
            if not flops[0]:
                raise StudyError(
                    f"model.cut {self.config.model.cut!r}: the device half multiplies nothing, so "
                    "the whole model cannot be counted in its forwards; use a later cut"
                )
            self._whole_forwards = sum(flops) / flops[0]
        return self._whole_forwards


def open_bench(setting: Setting, folder: Path) -> Bench:
    """Load data, export both halves to FOLDER. Raises InputErrors."""
    return Bench(setting, prepare(setting.config, folder))


class Meter:
    """Counters of one run, and its points."""

    def __init__(self, bench: Bench) -> None:
        self.now_s = 0.0
        self.bytes_up = self.bytes_down = self.server_steps = self.client_batches = 0
        self.client_forwards = 0.0
        self.points: list[Point] = []
        self._bench = bench

    def closed(self, number: int, client: torch.Tensor, server: torch.Tensor) -> bool:
        """Round `number` is over: score it when due. False when the run diverged."""
        run = self._bench.config.run
        done = number + 1
        self._bench.advanced(done)
        if done != run.rounds and done % self._bench.config.evaluation.every:
            return True
        scores = self._bench.scores(client, server)
        self.points.append(
            Point(
                done,
                self.now_s,
                scores.accuracy,
                scores.loss,
                self.bytes_up,
                self.bytes_down,
                self.client_forwards,
                self.server_steps,
                self.client_batches,
            )
        )
        return bool(np.isfinite(scores.loss))


def mean_weights(flats: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The weighted mean of vectors (d,), added in the order given."""
    total = torch.zeros_like(flats[0])
    for flat, share in zip(flats, shares, strict=True):
        total.add_(flat, alpha=share)
    return total


@torch.no_grad()
def _flops(client: TorchHalf, server: TorchHalf, xs: list[torch.Tensor]) -> tuple[int, int]:
    """Of a forward of each half: additions and multiplications of matrix products, convolutions."""
    with FlopCounterMode(display=False) as counter:
        h = client(*xs)
        first = counter.get_total_flops()
        server(h)
    return first, counter.get_total_flops() - first
