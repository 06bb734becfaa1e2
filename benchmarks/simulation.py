"""What a simulated device costs: seconds of a device-round, and the peak memory of a large fleet.

An MLP of 196-32-32-10 on made-up images of 28x28, pooled to 14x14; batch 32, tau 4, K 4, K_s 1.
Short runs, scored once in ten rounds as a long one is; 1,000 rounds are extrapolated.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.rows import Row
from emulation.simulate import Simulation
from server_node.config import load_config
from server_node.samples import Dataset

_OVERRIDES: Final = [
    "model.name=mlp:196-32-32-10", "model.cut=fc1", "data.pool=2", "devices.batch=32",
    "method.tau=4", "method.directions_client=4", "method.directions_server=1",
    "evaluation.every=10",
]  # fmt: skip
_LONG_ROUNDS: Final = 1000
_LONG_S: Final = 600.0
_MEMORY_BYTES: Final = 4 << 30


def measure(repetitions: int) -> Iterable[Row]:
    """The rows of `make bench`: processor seconds, which other programs disturb little."""
    data = _made_up()
    part = [_device_round_s(data, 1000, 100, 10) for _ in range(repetitions)]
    whole = [_device_round_s(data, 1000, 1000, 1) for _ in range(repetitions)]
    yield Row(
        "simulation: 1,000 rounds of 100 out of 1,000 devices, against 600 s",
        float(np.median(part)) * 100 * _LONG_ROUNDS / _LONG_S, 1.0,
        {"device_round_cpu_s": part}, f"{1e3 * float(np.median(part)):.2f} ms a device-round",
    )  # fmt: skip
    yield Row(
        "simulation: a device-round of 1,000 out of 1,000, against one of 100 out of 1,000",
        float(np.median(whole) / np.median(part)), None,
        {"device_round_cpu_s": whole}, f"{1e3 * float(np.median(whole)):.2f} ms a device-round",
    )  # fmt: skip
    _device_round_s(data, 10_000, 1000, 2)
    peak_bytes = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
    yield Row(
        "simulation: peak memory of 10,000 devices, 1,000 a round, against 4 GiB",
        peak_bytes / _MEMORY_BYTES, 1.0, {"peak_bytes": [peak_bytes]},
        f"{peak_bytes / (1 << 20):.0f} MiB, everything loaded",
    )  # fmt: skip


def _device_round_s(data: Dataset, devices: int, participants: int, rounds: int) -> float:
    """Processor seconds of a short run over its device-rounds."""
    given = [f"devices.count={devices}", f"devices.participants={participants}",
             f"run.rounds={rounds}"]  # fmt: skip
    config = load_config(None, [*_OVERRIDES, *given])
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(config, Path(folder), data)
        begin_s = time.process_time()
        simulation.play(lambda _: None)
        return (time.process_time() - begin_s) / (participants * rounds)


def _made_up() -> Dataset:
    random = np.random.default_rng(0)
    train, test = (
        ([random.integers(0, 256, (n, 1, 28, 28), np.uint8)], random.integers(0, 10, n))
        for n in (60_000, 10_000)
    )
    return Dataset("made up", *train, *test)
