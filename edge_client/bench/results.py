"""What a bench found, as results.json holds it. Latency and energy are those of one iteration.

An iteration is a forward of a batch, or a whole step. `median_s` is the median over the windows of
each window's median, `p90_s` that of all timed iterations together. Energy is the median over the
windows; a joule that was measured and one that was modelled have fields of different names
(wire_protocol/energy.py).
"""

from __future__ import annotations

from typing import Final

from edge_client.bench.environment import Environment
from edge_client.bench.records import Configuration, Record
from wire_protocol.energy import EnergyModelled, NoEnergy, Origin

RESULTS_FORMAT: Final = "musplit-bench-results/1"


class IterationEnergy(Record, frozen=True, tag="measured"):
    """Joules of one iteration by a meter: the median over the windows."""

    energy_j: float  # gross
    net_j: float | None  # less the idle power; None: idle was not measured
    # Coverage factor 2: the meter's, and 2 s / sqrt(n) of the n windows, in quadrature.
    uncertainty_j: float
    net_uncertainty_j: float | None  # as if gross and idle were wrong independently
    spread_relative: float  # (highest - lowest) / median over the windows
    mean_w: float
    idle_w: float | None
    windows: int
    fewest_samples: int  # of a window
    lowest_rate_hz: float  # achieved in a window
    largest_gap_s: float
    origin: Origin


class Phases(Record, frozen=True):
    """Seconds of a median step by phase, and `compute_s`, the median without encoding."""

    perturb_s: float
    forward_s: float
    encode_s: float
    compute_s: float


class Figures(Record, frozen=True):
    """Forwards, or steps, of one cut."""

    windows: int
    iterations: int
    median_s: float
    p90_s: float
    mean_s: float  # a window's length by its iterations: the median over the windows
    spread_relative: float  # (highest - lowest) / median of the windows' medians
    utilisation: float  # processor time over time and cores
    phases: Phases | None  # of steps
    energy: IterationEnergy | EnergyModelled | NoEnergy


class WindowResult(Record, frozen=True):
    """One window, short."""

    name: str
    seconds: float
    iterations: int
    median_s: float | None  # None: idle
    mean_w: float | None
    power_samples: int
    other_cores: float  # that computed something else, in the mean
    reason: str | None  # why its power does not count
    temperature_before_c: float | None
    temperature_after_c: float | None
    frequency_after_hz: float | None
    throttled: bool | None  # None: the machine does not tell


class CutResult(Record, frozen=True):
    """One cut; None where its windows are missing."""

    bundle: str
    graph: str
    model: str
    cut: str
    parameters: int
    weights_bytes: int
    activation_bytes: int  # of a batch, float32
    frame_bytes: int | None  # that one step sends, encoded
    rss_bytes: int | None  # of the measured process in its last window
    peak_rss_bytes: int | None
    idle_w: float | None
    forward: Figures | None
    step: Figures | None
    windows: list[WindowResult]


class Results(Record, frozen=True):
    """results.json."""

    format: str
    evidence_sha256: str
    reportable: bool
    not_reportable: list[str]  # why not
    notes: list[str]
    configuration: Configuration
    environments: list[Environment]
    cuts: list[CutResult]
