"""Delay models of the virtual clock: pure functions of (run seed, device, round), seeded.

`exponential` and `uniform` draw the seconds of a device's whole zeroth-order step of 2 K + 1
forwards, each round anew; other work of the same device and round takes its share of that draw.
`gas` is the model of GAS (Yang & Liu, AAAI 2025, arXiv 2409.01251): a device has U(1e9, 1e10)
FLOP/s, drawn once, and a Shannon link of bandwidth * log2(1 + SNR); docs/simulation.md says where
this departs. `recorded` takes over what a run was measured to need (emulation/fit.py).
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np

from server_node.errors import ConfigError
from server_node.sections import SimulationSection

_TWO_53: Final = 1 << 53
# Path loss of a macro cell, d in km (3GPP TR 36.814, table A.2.1.1-3), and thermal noise.
_LOSS_DB: Final = 128.1
_LOSS_DB_A_DECADE: Final = 37.6
_NOISE_DBM_A_HZ: Final = -174.0
_NEAREST_KM: Final = 0.01


class Draw(IntEnum):
    """What a random number is for; the second word of its Philox key."""

    COMPUTE = 0
    FLOPS = 1
    PLACE = 2
    PRESENCE = 3


class DeviceTiming(NamedTuple):
    """What a device was measured to need, in seconds."""

    fixed_s: float  # from a round's opening to its first forward: links, waiting, what is added
    forward_s: float  # a forward, with its perturbation and encoding


class Timings(NamedTuple):
    """What a run was measured to need; `devices` are cycled, times in seconds."""

    devices: list[DeviceTiming]
    server_step_s: float
    server_measure_s: float  # a direction


class Delays:
    """Seconds that each device needs, in round `number`; lists of the section are cycled."""

    def __init__(
        self, section: SimulationSection, run_seed: int, *, directions: int,
        forward_flop: float = 0.0, timings: Timings | None = None,
    ) -> None:  # fmt: skip
        """`directions` is K of the step that mean_s speaks of.

        `forward_flop` is what a forward of the device half costs on one batch: needed by `gas`;
        `timings` are needed by `recorded`.
        """
        self._section, self._run_seed = section, run_seed
        self._forwards = 2 * directions + 1
        self._forward_flop, self._timings = forward_flop, timings
        self._rates: dict[int, float] = {}
        self._flops: dict[int, float] = {}

    def compute_s(self, device: int, number: int) -> float:
        """The whole zeroth-order step of a round: 2 K + 1 forwards."""
        return self.for_forwards(device, number, self._forwards)

    def for_forwards(
        self, device: int, number: int, forwards: float, *, begun: bool = False
    ) -> float:
        """So many forwards, or work worth as many; `begun`: not the first of the round."""
        section = self._section
        match section.compute:
            case "none":
                return 0.0
            case "gas":
                return forwards * self._forward_flop / self._flops_of(device)
            case "recorded":
                timing = self._timing(device)
                return (0.0 if begun else timing.fixed_s) + forwards * timing.forward_s
        mean_s = section.mean_s[device % len(section.mean_s)]
        u = uniform(self._run_seed, Draw.COMPUTE, device, number)
        if section.compute == "exponential":
            factor = -math.log1p(-u)
        else:
            factor = 1.0 + section.spread * (2.0 * u - 1.0)
        return mean_s * factor * forwards / self._forwards

    def up_s(self, device: int, size_bytes: int) -> float:
        """A message from the device to the server."""
        return self.latency_s + self._transfer_s(device, size_bytes, self._section.up_bytes_s)

    def down_s(self, device: int, size_bytes: int) -> float:
        """A message from the server to the device."""
        return self.latency_s + self._transfer_s(device, size_bytes, self._section.down_bytes_s)

    @property
    def server_step_s(self) -> float:
        """A step of the server half for one device; in parallel, for all that wait."""
        timings = self._timings
        return self._section.server_step_s if timings is None else timings.server_step_s

    @property
    def server_measure_s(self) -> float:
        """Measuring one direction of one device."""
        timings = self._timings
        return self._section.server_measure_s if timings is None else timings.server_measure_s

    @property
    def latency_s(self) -> float:
        """Of any message; while one is under way the link is free for the next."""
        return self._section.latency_s

    def _transfer_s(self, device: int, size_bytes: int, rates: list[float]) -> float:
        if self._section.compute == "gas":
            return size_bytes / self._channel_bytes_s(device)
        return size_bytes / rates[device % len(rates)] if rates else 0.0

    def _timing(self, device: int) -> DeviceTiming:
        assert self._timings is not None  # see __init__
        return self._timings.devices[device % len(self._timings.devices)]

    def _flops_of(self, device: int) -> float:
        if device not in self._flops:
            low, high = self._section.flops
            u = uniform(self._run_seed, Draw.FLOPS, device, 0)
            self._flops[device] = low + (high - low) * u
        return self._flops[device]

    def _channel_bytes_s(self, device: int) -> float:
        """Of a place drawn once, uniform on the disc of the cell; both ways alike."""
        if device not in self._rates:
            section = self._section
            u = uniform(self._run_seed, Draw.PLACE, device, 0)
            distance_km = max(_NEAREST_KM, section.radius_km * math.sqrt(u))
            loss_db = _LOSS_DB + _LOSS_DB_A_DECADE * math.log10(distance_km)
            noise_w = 10 ** ((_NOISE_DBM_A_HZ - 30.0) / 10.0) * section.bandwidth_hz
            snr = section.power_w * 10 ** (-loss_db / 10.0) / noise_w
            rate = section.bandwidth_hz * math.log1p(snr) / math.log(2.0) / 8.0
            if not rate:
                raise ConfigError(
                    "simulation.power_w, bandwidth_hz, radius_km: nothing of what device "
                    f"{device} sends would arrive; use a smaller radius or more power"
                )
            self._rates[device] = rate
        return self._rates[device]


class Presence:
    """When devices leave and return: spells of exponential length, everybody there at first."""

    def __init__(self, section: SimulationSection, run_seed: int) -> None:
        self._up_s, self._down_s, self._run_seed = section.up_s, section.down_s, run_seed

    @property
    def changes(self) -> bool:
        """True when anybody ever leaves."""
        return self._up_s > 0

    def spell_s(self, device: int, spell: int) -> float:
        """How long spell 0 (there), 1 (away), 2 (there), .. of a device lasts."""
        mean_s = self._down_s if spell % 2 else self._up_s
        return -mean_s * math.log1p(-uniform(self._run_seed, Draw.PRESENCE, device, spell))


def uniform(run_seed: int, draw: Draw, device: int, number: int) -> float:
    """A number in [0, 1) that is a function of its coordinates (Philox4x64-10, one block)."""
    key = np.array([run_seed, draw << 32 | device], np.uint64)
    counter = np.array([0, number, 0, 1], np.uint64)  # the last word: apart from the directions'
    word = int(np.random.Philox(key=key, counter=counter).random_raw())
    return (word >> 11) / _TWO_53
