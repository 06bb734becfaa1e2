"""Records of energy. What was measured and what was modelled never share a field.

A figure in joules is `EnergyMeasured` (energy_j), `EnergyModelled` (modelled_j) or `NoEnergy`, a
reason and no number. docs/energy.md tells how they come about.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

# Where the power was measured: rails of the processor, the board's supply, the wall.
Boundary = Literal["soc-rails", "board-dc", "wall-ac"]
Line = Annotated[str, Meta(max_length=200)]
Joules = Annotated[float, Meta(ge=0, le=1e15)]
Watts = Annotated[float, Meta(ge=0, le=1e6)]
Span = Annotated[float, Meta(ge=0, le=1e10)]  # seconds
Rate = Annotated[float, Meta(ge=0, le=1e6)]


class Origin(Struct, frozen=True, forbid_unknown_fields=True):
    """Which meter gave a figure, and what is known of it."""

    meter: Line  # the kind, e.g. "ina226"
    driver: Line  # what was read: a path by its driver's name, rails, an address
    boundary: Boundary
    # "instant": the power at the reading's time; "mean": since the reading before, so that the
    # sum of readings times intervals is the energy itself.
    reading: Literal["instant", "mean"]
    rate_hz: Rate  # the rate asked for
    resolution_w: Watts | None  # None: unknown
    uncertainty_relative: Annotated[float, Meta(ge=0, le=1)]
    uncertainty_source: Line


class EnergyMeasured(Struct, frozen=True, forbid_unknown_fields=True, tag="measured"):
    """The energy of one window by a meter."""

    energy_j: Joules  # gross
    net_j: Annotated[float, Meta(ge=-1e15, le=1e15)] | None  # less idle_w for the whole window
    idle_w: Watts | None  # None: idle was not measured
    uncertainty_j: Joules  # of energy_j; coverage factor 2
    window_s: Span
    samples: Annotated[int, Meta(ge=0, lt=1 << 40)]
    rate_hz: Rate  # achieved
    largest_gap_s: Span
    origin: Origin


class EnergyModelled(Struct, frozen=True, forbid_unknown_fields=True, tag="modelled"):
    """The energy of one window by a model of the board: nothing was measured."""

    modelled_j: Joules
    modelled_low_j: Joules
    modelled_high_j: Joules
    window_s: Span
    boundary: Boundary
    model: Line  # the formula and its numbers
    source: Line  # where the numbers are from


class NoEnergy(Struct, frozen=True, forbid_unknown_fields=True, tag="none"):
    """Neither measured nor modelled, and why."""

    reason: Annotated[str, Meta(max_length=400)]


Energy = EnergyMeasured | EnergyModelled | NoEnergy
