"""The results for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from edge_client.bench.results import Figures, IterationEnergy, Results
from edge_client.bench.svg import quantity
from wire_protocol.energy import EnergyModelled
from wire_protocol.messages import printable


def table(results: Results) -> str:
    """Lines for people."""
    return printable_lines(_lines(results))


def as_json(results: Results, **more: Any) -> str:
    """One object: the fields of results.json, and what a command adds."""
    return msgspec.json.encode({**msgspec.to_builtins(results), **more}).decode()


def printable_lines(lines: Iterator[str]) -> str:
    """Without what a terminal would obey: names come from bundles."""
    return "\n".join(printable(line) for line in lines)


def _lines(results: Results) -> Iterator[str]:
    for cut in results.cuts:
        memory = quantity(float(cut.peak_rss_bytes), "B") if cut.peak_rss_bytes else "not measured"
        activation = quantity(float(cut.activation_bytes), "B")
        yield f"{cut.model}, cut at {cut.cut}"
        yield f"  {'peak memory':12} {memory}"
        yield f"  {'activation':12} {activation} a batch of {results.configuration.batch}"
        for name, figures in (("forward", cut.forward), ("step", cut.step)):
            if figures is not None:
                yield f"  {name:12} {_latency(figures)}"
                yield f"  {'':12} {_energy(figures)}"
    for note in results.notes:
        yield f"note: {note}"
    for reason in results.not_reportable:
        yield f"not reportable: {reason}"
    if results.reportable:
        yield "reportable"
    yield f"evidence sha256 {results.evidence_sha256}"


def _latency(figures: Figures) -> str:
    return (
        f"{quantity(figures.median_s, 's')} median, {quantity(figures.p90_s, 's')} at 90 %, "
        f"windows within {figures.spread_relative:.1%}"
    )


def _energy(figures: Figures) -> str:
    energy = figures.energy
    if isinstance(energy, IterationEnergy):
        net = "unknown" if energy.net_j is None else quantity(energy.net_j, "J")
        return (
            f"{quantity(energy.energy_j, 'J')} measured +- {quantity(energy.uncertainty_j, 'J')}, "
            f"net of idle {net} ({energy.origin.meter}, {energy.origin.boundary})"
        )
    if isinstance(energy, EnergyModelled):
        low, high = quantity(energy.modelled_low_j, "J"), quantity(energy.modelled_high_j, "J")
        return (
            f"{quantity(energy.modelled_j, 'J')} modelled, {low} to {high} ({energy.boundary}); "
            "not measured"
        )
    return f"no energy: {energy.reason}"
