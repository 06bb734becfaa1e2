"""Evidence of a board that nobody owns: windows of known latency and power, written by hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from edge_client.bench.environment import Environment
from edge_client.bench.evidence import Evidence
from edge_client.bench.records import Configuration, Cut, Latencies, ModelPower, Window, places
from wire_protocol.energy import Origin

ORIGIN = Origin(
    meter="ina226", driver="a tree", boundary="board-dc", reading="instant", rate_hz=20.0,
    resolution_w=0.001, uncertainty_relative=0.01, uncertainty_source="data sheet",
)  # fmt: skip
WATTS = {"idle": 2.0, "forward": 4.0, "step": 6.0}
ITERATION_S = {"forward": 0.01, "step": 0.25}
CUT = Cut(
    bundle="ab" * 32, graph="cd" * 32, folder="/nowhere", model="mlp:64-32-32-10", cut="fc1",
    parameters=2080, weights_bytes=8320, activation_shape=[32],
)  # fmt: skip
CONFIGURATION = Configuration(
    format="musplit-bench/1", mode="energy", batch=32, directions=16, lam=1e-3, encoding="float32",
    threads=4, window_s=10.0, repeats=5, rate_hz=20.0, meter="auto", gpio="", profile="rpi-4b",
    cuts=[CUT], model_power=ModelPower("rpi-4b", 2.7, 6.4, "board-dc", "a source"),
)  # fmt: skip
ENVIRONMENT = Environment(
    started="2026-07-01T12:00:00Z", board="Raspberry Pi 4 Model B Rev 1.4", machine="aarch64",
    processor="Cortex-A72", cores=4, memory_bytes=4 << 30, kernel="6.6", system="Debian 12",
    governor="ondemand", versions={"musplit": "0.1.0"}, meter=ORIGIN,
    meter_reason=None,
)  # fmt: skip


def window(kind: str, begin_s: float, end_s: float, **changes: object) -> Window:
    taken = Window(
        begin_s=begin_s, end_s=end_s,
        iterations=0 if kind == "idle" else round((end_s - begin_s) / ITERATION_S[kind]),
        cpu_s=0.0 if kind == "idle" else 0.9 * (end_s - begin_s), other_cpu_s=0.3,
        rss_bytes=60_000_000,
        peak_rss_bytes=61_000_000, frame_bytes=69_000 if kind == "step" else 0,
        temperature_before_c=48.0, temperature_after_c=51.5, frequency_before_hz=6e8,
        frequency_after_hz=1.8e9, throttle_before="vcgencmd:0x0", throttle_after="vcgencmd:0x0",
        power_note=None,
    )  # fmt: skip
    return msgspec.structs.replace(taken, **changes)


def latencies(kind: str, seconds: float, repeat: int) -> Latencies:
    """Every tenth iteration is a tenth slower; windows differ by a percent from one to the next."""
    if kind == "idle":
        return Latencies([], [], [], [], [])
    one_s = ITERATION_S[kind] * (1 + 0.01 * (repeat - 2))
    count = round(seconds / ITERATION_S[kind])
    all_s = [one_s * (1.1 if n % 10 == 9 else 1.0) for n in range(count)]
    if kind == "forward":
        return Latencies(list(range(count)), all_s, [0.0] * count, all_s, [0.0] * count)
    return Latencies(
        list(range(count)), all_s, *([part * s for s in all_s] for part in (0.2, 0.7, 0.1))
    )


def power(kind: str, begin_s: float, end_s: float, rate_hz: float = 20.0):
    times_s = np.arange(begin_s - 0.2, end_s + 0.2, 1 / rate_hz)
    return times_s.tolist(), np.full(len(times_s), WATTS[kind]).tolist()


def make_evidence(
    folder: Path, *, configuration: Configuration = CONFIGURATION,
    environment: Environment = ENVIRONMENT, only: int | None = None, gap_in: str = "",
    **changes: object,
) -> Evidence:  # fmt: skip
    """All windows, or the first `only`; `changes` are of every window's fields."""
    evidence = Evidence.create(folder, configuration, environment)
    for number, place in enumerate(list(places(configuration))[:only]):
        begin_s = 1000.0 + 20.0 * number
        end_s = begin_s + configuration.window_s
        trace = power(place.kind, begin_s, end_s) if configuration.mode == "energy" else None
        if trace is not None and place.name == gap_in:
            kept = [i for i, t in enumerate(trace[0]) if not begin_s + 3 < t < begin_s + 5]
            trace = [trace[0][i] for i in kept], [trace[1][i] for i in kept]
        evidence.add(
            place, window(place.kind, begin_s, end_s, **changes),
            latencies(place.kind, configuration.window_s, place.repeat), trace,
        )  # fmt: skip
    return evidence
