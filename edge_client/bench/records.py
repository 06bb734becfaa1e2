"""What a bench is asked to do and what each of its windows gives: the raw side of the evidence.

A bench measures cuts (client bundles) one after the other. Of each it takes windows: idle before,
`repeats` of forward passes, `repeats` of zeroth-order steps, idle after. Nothing here is computed
from anything else here; edge_client/bench/compute.py does that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Final, Literal, NamedTuple

from msgspec import Meta, Struct

from wire_protocol.encodings import Encoding
from wire_protocol.energy import Boundary

FORMAT: Final = "musplit-bench/1"
# What a figure needs to be reported (after EEMBC's rules for MLPerf Tiny).
REPORTABLE_WINDOW_S: Final = 10.0
REPORTABLE_REPEATS: Final = 5
MIN_ITERATIONS: Final = 10
MIN_POWER_SAMPLES: Final = 100
# What the rest of the machine may compute beside, in cores.
MAX_OTHER_CORES: Final = 0.25

Kind = Literal["idle", "forward", "step"]
Mode = Literal["performance", "energy"]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a file in the evidence; a field that nobody knows is an error."""


class Cut(Record, frozen=True):
    """A client bundle that is measured."""

    bundle: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256 of its manifest
    graph: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256 of its client.onnx
    folder: str  # where it lay: a resumed bench looks there again
    model: str
    cut: str
    parameters: Count  # d_c
    weights_bytes: Count
    activation_shape: list[Count]  # of a sample


class ModelPower(Record, frozen=True):
    """The board's model, for when no joules are measured: as edge_client.power.model.BoardModel."""

    board: str
    idle_w: Annotated[float, Meta(gt=0)]
    busy_w: Annotated[float, Meta(gt=0)]
    boundary: Boundary
    source: str


class Configuration(Record, frozen=True):
    """configuration.toml: what was asked, and of which bundles."""

    format: Literal["musplit-bench/1"]
    mode: Mode
    batch: Annotated[int, Meta(ge=1)]
    directions: Annotated[int, Meta(ge=1)]  # K: a step is 2 K + 1 forwards
    lam: Annotated[float, Meta(gt=0)]
    encoding: Encoding
    threads: Annotated[int, Meta(ge=1)]
    window_s: Annotated[float, Meta(gt=0, le=86_400)]
    repeats: Annotated[int, Meta(ge=1, le=1000)]
    rate_hz: Annotated[float, Meta(gt=0, le=10_000)]  # of the power samples, as asked for
    meter: str  # as asked for
    gpio: str  # empty: no edge
    profile: str  # empty: none
    cuts: Annotated[list[Cut], Meta(min_length=1)]
    model_power: ModelPower | None = None


class Place(NamedTuple):
    """Which window: names its files."""

    cut: int
    kind: Kind
    repeat: int

    @property
    def name(self) -> str:
        """File names in raw/ begin with it."""
        return f"cut{self.cut}-{self.kind}-{self.repeat}"


class Window(Record, frozen=True):
    """NAME.window.csv: one window, as it went.

    Times are of the machine's monotonic clock. Conditions were read right before and after;
    None: the machine does not tell. `throttle_*` is what its source calls it, see conditions.py.
    """

    begin_s: float
    end_s: float
    iterations: Count
    cpu_s: Seconds  # processor time of the measured process in the window
    other_cpu_s: Seconds  # and of everything else on the machine, the sampler included
    rss_bytes: Count
    peak_rss_bytes: Count  # since that process began
    frame_bytes: Count  # encoded by one step
    temperature_before_c: float | None
    temperature_after_c: float | None
    frequency_before_hz: float | None
    frequency_after_hz: float | None
    throttle_before: str | None
    throttle_after: str | None
    power_note: str | None  # why readings of the power are missing, where some are

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end_s - self.begin_s


class Latencies(NamedTuple):
    """NAME.latency.csv: iterations timed alone, by their number in the window.

    Fast iterations are timed every so many, so that a window has some 20,000 rows at most;
    all are counted. Phases are 0 for forwards.
    """

    number: list[int]
    seconds: list[float]
    perturb_s: list[float]
    forward_s: list[float]
    encode_s: list[float]

    def fault(self) -> str:
        """Why it is no such table; empty when it is."""
        if len({len(column) for column in self}) > 1:
            return "columns of different lengths"
        numbers = (x for column in self[1:] for x in column)
        if any(not math.isfinite(x) or x < 0 for x in numbers):
            return "a time that is negative or not finite"
        return ""


def places(configuration: Configuration) -> Iterator[Place]:
    """All windows of a bench, in the order in which they are taken."""
    idle = configuration.mode == "energy"
    for cut in range(len(configuration.cuts)):
        if idle:
            yield Place(cut, "idle", 0)
        for repeat in range(configuration.repeats):
            yield Place(cut, "forward", repeat)
        for repeat in range(configuration.repeats):
            yield Place(cut, "step", repeat)
        if idle:
            yield Place(cut, "idle", 1)


def window_target_s(configuration: Configuration) -> float:
    """How long a window shall be: as asked, and in energy mode long enough for the samples."""
    if configuration.mode == "performance" or configuration.window_s < REPORTABLE_WINDOW_S:
        return configuration.window_s
    # Two more: an edge may fall between samples.
    return max(configuration.window_s, (MIN_POWER_SAMPLES + 2) / configuration.rate_hz)
