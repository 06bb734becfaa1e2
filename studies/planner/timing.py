"""Seconds of a round, from the delay model: many rounds are drawn, no model is computed.

A round is that of the virtual clock (docs/simulation.md). Devices learn of it with the last
commit, compute 2 K + 1 forwards, and send the activation and the groups of differences one after
the other as they are ready. The server steps tau times for each from its activation on, measures
its differences, and closes when the last is complete.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.zo_step import GROUP_BYTES
from emulation.delays import Delays
from server_node.config import Config
from server_node.sections import SimulationSection
from studies.planner.choice import Choice
from studies.planner.cuts import CutCost
from studies.planner.fleet import DeviceKind, Fleet
from wire_protocol.directions import participants
from wire_protocol.encodings import Encoding
from wire_protocol.frames import Frame, FrameKind, encode_frame

Seconds = NDArray[np.float64]

_SAMPLES: Final = 64
# Rounds that no run has: a prediction is not made from the draws that it is checked with.
_FIRST_ROUND: Final = 1 << 24
# Around a payload: fixed header, topic, packet identifier; of a commit: the envelope of an entry.
_PUBLISH_BYTES: Final = 40
_ENTRY_BYTES: Final = 20


class Draws(NamedTuple):
    """Rounds of a fleet: who takes part, and each one's factor on its mean; (rounds, devices)."""

    devices: NDArray[np.int64]
    factors: Seconds


class Parts(NamedTuple):
    """Where a round's seconds go, means over the drawn rounds."""

    round_s: float
    device_s: float  # until the last participant has computed
    up_s: float  # more until its differences have arrived, beyond the computing
    server_s: float  # more until the server is done
    server_busy_s: float


class Traffic(NamedTuple):
    """Bytes of a participant's round: the frames in order, and what comes down."""

    frames_up: list[int]
    forwards: list[int]  # until each frame is ready
    down: int

    @property
    def up(self) -> int:
        """All frames."""
        return sum(self.frames_up)


def draw_rounds(
    fleet: Fleet, config: Config, first: int = _FIRST_ROUND, count: int = _SAMPLES
) -> Draws:
    """Draw rounds `first`, first + 1, .. of a fleet, as the virtual clock would."""
    delays = Delays(simulation(fleet, [1.0], 0.0, 0.0), config.run.seed, directions=1)
    everybody = list(range(len(fleet.kinds)))
    chosen = [
        participants(config.run.seed, number, everybody, config.participants)
        for number in range(first, first + count)
    ]
    factors = [
        [delays.compute_s(device, first + row) for device in devices]
        for row, devices in enumerate(chosen)
    ]
    return Draws(np.array(chosen, np.int64), np.array(factors))


def simulation(
    fleet: Fleet, mean_s: list[float], step_s: float, measure_s: float
) -> SimulationSection:
    """The fleet as the virtual clock's section."""
    constant = fleet.delays.model == "constant"
    return SimulationSection(
        compute="exponential" if fleet.delays.model == "exponential" else "uniform",
        spread=0.0 if constant else fleet.delays.spread, mean_s=mean_s,
        up_bytes_s=[kind.up_bytes_s for kind in fleet.kinds],
        down_bytes_s=[kind.down_bytes_s for kind in fleet.kinds],
        latency_s=fleet.delays.latency_s, server=fleet.server.mode, server_step_s=step_s,
        server_measure_s=measure_s,
    )  # fmt: skip


def forward_s(kind: DeviceKind, cut: CutCost, batch: int) -> float:
    """Seconds of one forward of one batch; the cut is one that the kind knows."""
    if kind.forward_s:
        return kind.forward_s[cut.cut]
    return batch * cut.client_flops / kind.flops_per_s


def server_seconds(fleet: Fleet, cut: CutCost, batch: int, directions: int) -> tuple[float, float]:
    """Of one step with K_s directions, and of measuring one direction of a device."""
    if fleet.server.step_s:
        return fleet.server.step_s * directions, fleet.server.measure_s
    both_sides_s = 2 * batch * cut.server_flops / fleet.server.flops_per_s
    return both_sides_s * directions, both_sides_s


def mean_seconds(fleet: Fleet, config: Config, cut: CutCost, directions: int) -> list[float]:
    """Of each device's 2 K + 1 forwards."""
    batch = config.devices.batch
    return [(2 * directions + 1) * forward_s(kind, cut, batch) for kind in fleet.kinds]


def traffic(config: Config, cut: CutCost, directions: int, encoding: Encoding) -> Traffic:
    """Bytes of one participant's round, by the real encoder."""
    shape = (config.devices.batch, *cut.activation_shape)
    labels = np.zeros(shape[0], np.uint32)
    group = max(1, min(directions, GROUP_BYTES // (config.devices.batch * cut.activation_bytes)))
    sizes: dict[int, int] = {}
    frames, forwards = [_frame_bytes(shape, labels, encoding, FrameKind.ACTIVATION)], [1]
    for first in range(0, directions, group):
        count = min(group, directions - first)
        if count not in sizes:
            sizes[count] = _frame_bytes(
                (count, *shape), labels[:0], encoding, FrameKind.DIFFERENCES
            )
        frames.append(sizes[count])
        forwards.append(1 + 2 * (first + count))
    commit = config.participants * (4 * directions + _ENTRY_BYTES)
    return Traffic(frames, forwards, commit + 2 * _PUBLISH_BYTES)


def round_seconds(
    fleet: Fleet, config: Config, cut: CutCost, choice: Choice, draws: Draws, sent: Traffic
) -> Seconds:
    """Seconds of each drawn round (rounds,)."""
    return _play(fleet, config, cut, choice, draws, sent)[-1]


def parts_of_round(
    fleet: Fleet, config: Config, cut: CutCost, choice: Choice, draws: Draws, sent: Traffic
) -> Parts:
    """The mean round, and what it is made of."""
    computed, arrived, end = _play(fleet, config, cut, choice, draws, sent)
    step_s, measure_s = server_seconds(
        fleet, cut, config.devices.batch, choice.probe.directions_server
    )
    busy_s = choice.probe.tau * step_s + choice.probe.directions_client * measure_s
    each = 1 if fleet.server.mode == "parallel" else config.participants
    return Parts(
        float(end.mean()), float(computed.mean()), float((arrived - computed).mean()),
        float((end - arrived).mean()), busy_s * each,
    )  # fmt: skip


def _play(
    fleet: Fleet, config: Config, cut: CutCost, choice: Choice, draws: Draws, sent: Traffic
) -> tuple[Seconds, Seconds, Seconds]:
    """Each round's times when the last device has computed, all has arrived, all is done."""
    probe, kinds, latency_s = choice.probe, fleet.kinds, fleet.delays.latency_s
    up = np.array([kind.up_bytes_s for kind in kinds])[draws.devices]
    down = np.array([kind.down_bytes_s for kind in kinds])[draws.devices]
    mean_s = np.array(mean_seconds(fleet, config, cut, probe.directions_client))
    compute_s = mean_s[draws.devices] * draws.factors
    begin = latency_s + sent.down / down
    free, arrivals = begin, []
    for size_bytes, forwards in zip(sent.frames_up, sent.forwards, strict=True):
        ready = begin + compute_s * forwards / sent.forwards[-1]
        free = np.maximum(ready, free) + size_bytes / up
        arrivals.append(free + latency_s)
    step_s, measure_s = server_seconds(fleet, cut, config.devices.batch, probe.directions_server)
    steps_s, answers_s = probe.tau * step_s, probe.directions_client * measure_s
    if fleet.server.mode == "parallel":
        done = np.maximum(arrivals[0] + steps_s, arrivals[-1]) + answers_s
        end = done.max(axis=1)
    else:
        end = _busy_until(arrivals[0], arrivals[-1], steps_s, answers_s)
    return (begin + compute_s).max(axis=1), arrivals[-1].max(axis=1), end


def _busy_until(first: Seconds, last: Seconds, steps_s: float, answers_s: float) -> Seconds:
    """When one server that is never idle while there is work is done; arrivals (rounds, devices).

    Whatever the order, it ends at the maximum over arrivals of arrival + work that came then or
    later: steps with the activations, answers with the differences.
    """
    at = np.concatenate([first, last], axis=1)
    work = np.concatenate([np.full_like(first, steps_s), np.full_like(last, answers_s)], axis=1)
    order = np.argsort(at, axis=1, kind="stable")
    at, work = np.take_along_axis(at, order, 1), np.take_along_axis(work, order, 1)
    left = np.cumsum(work[:, ::-1], axis=1)[:, ::-1]
    result: Seconds = (at + left).max(axis=1)
    return result


def _frame_bytes(
    shape: tuple[int, ...], labels: NDArray[np.uint32], encoding: Encoding, kind: FrameKind
) -> int:
    frame = Frame(kind, 1, 0, 0, 0, np.zeros(shape, np.float32), labels, encoding)
    return len(encode_frame(frame)) + _PUBLISH_BYTES
