"""The one page about a bench: no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from edge_client.bench.evidence import MANIFEST_FILE
from edge_client.bench.records import window_target_s
from edge_client.bench.results import CutResult, Figures, IterationEnergy, Results
from edge_client.bench.svg import quantity
from wire_protocol.energy import EnergyModelled

_ROWS: Final = ("median", "90 %", "spread of windows", "energy", "net of idle", "energy is")
_STYLE: Final = """
:root{color-scheme:light}
body{margin:0 auto;max-width:1000px;padding:16px;background:#fff;color:#1f2933;
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
h1{font-size:1.5em;line-height:1.2;margin:.3em 0}h2{font-size:1.15em;margin:1.6em 0 .5em}
p,ul{margin:.5em 0}ul{padding-left:1.2em}
.verdict{border-left:5px solid;padding:.6em .9em;margin:1em 0;border-radius:3px}
.good{border-color:#2f855a;background:#f0f9f4}.bad{border-color:#c53030;background:#fdf3f3}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:.35em .7em .35em 0;text-align:left;vertical-align:top;border-bottom:1px solid #e4e7eb}
th{font-weight:600;color:#52606d}.facts th{width:9em}.figures th{width:28%}
td{overflow-wrap:anywhere}table{table-layout:fixed}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:18px}
.plots svg{width:100%;height:auto;display:block}
.soft{color:#616e7c;font-size:13px}code{font-size:.92em;overflow-wrap:anywhere}
@media print{body{padding:0}.plots svg{break-inside:avoid}}
"""
_LEGEND: Final = """
<p class="soft">Bars: median. White dots: the median of each window. Whisker: to the 90th percentile
for latency; the uncertainty (coverage factor 2) for measured energy; the bounds of the model for
modelled energy, which is drawn hollow.</p>
"""


def page(results: Results, plots: Sequence[str]) -> str:
    """HTML; `plots` are SVG elements."""
    environment = results.environments[0]
    name = environment.board or environment.processor
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(f'musplit bench: {name}')}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(name)}</h1>",
            f'<p class="soft">musplit bench, {escape(environment.started)}</p>',
            _verdict(results),
            "<h2>Figures</h2>",
            *(_cut(cut) for cut in results.cuts),
            '<h2>Plots</h2><div class="plots">',
            *(f"<div>{svg}</div>" for svg in plots),
            "</div>",
            _LEGEND,
            "<h2>How it was measured</h2>",
            _facts(_method(results)),
            "<h2>On what</h2>",
            _facts(_machine(results)),
            "<h2>Checking it</h2>",
            _checking(results),
            "</body></html>\n",
        ]
    )


def _checking(results: Results) -> str:
    return (
        f"<p>Digest of the evidence: <code>{results.evidence_sha256}</code>, the SHA-256 of "
        f"<code>{MANIFEST_FILE}</code>, which names every raw file with its own. <code>musplit "
        "report FOLDER</code> checks them all and makes this page again, byte for byte; "
        f"<code>sha256sum --check {MANIFEST_FILE}</code> checks without musplit.</p>"
    )


def _verdict(results: Results) -> str:
    if results.reportable:
        text = '<div class="verdict good"><b>Reportable.</b> Windows, repeats and samples suffice'
        hot = [w.throttled for cut in results.cuts for w in cut.windows]
        text += "; no window was throttled.</div>" if None not in hot else ".</div>"
    else:
        text = '<div class="verdict bad"><b>Not reportable:</b>' + _list(results.not_reportable)
        text += "</div>"
    return text + (_list(results.notes) if results.notes else "")


def _cut(cut: CutResult) -> str:
    kinds = {"forward of a batch": cut.forward, "step": cut.step}
    columns = {what: _column(figures) for what, figures in kinds.items() if figures is not None}
    header = "".join(f"<th>{what}</th>" for what in columns)
    rows = "".join(
        f"<tr><th>{name}</th>"
        + "".join(f"<td>{escape(cells[name])}</td>" for cells in columns.values())
        + "</tr>"
        for name in _ROWS
    )
    table = f'<table class="figures"><tr><th></th>{header}</tr>{rows}</table>'
    return (
        f"<h3>{escape(cut.model)}, cut at {escape(cut.cut)}</h3>"
        + (table if columns else "<p>No window was taken.</p>")
        + f'<p class="soft">{escape(_sizes(cut))}<br>bundle <code>{cut.bundle}</code></p>'
    )


def _sizes(cut: CutResult) -> str:
    facts = [f"{cut.parameters:,} parameters trained", f"weights {_bytes(cut.weights_bytes)}"]
    facts.append(f"activation {_bytes(cut.activation_bytes)} a batch")
    if cut.frame_bytes:
        facts.append(f"frames {_bytes(cut.frame_bytes)} a step")
    if cut.peak_rss_bytes:
        facts.append(f"peak memory {_bytes(cut.peak_rss_bytes)} resident")
    if cut.step is not None and cut.step.phases is not None:
        phases = cut.step.phases
        facts.append(
            f"of a step {quantity(phases.perturb_s, 's')} perturbing, "
            f"{quantity(phases.forward_s, 's')} forward, {quantity(phases.encode_s, 's')} encoding"
        )
    return "; ".join(facts)


def _column(figures: Figures) -> dict[str, str]:
    """The cells of _ROWS."""
    energy = figures.energy
    net = "-"
    if isinstance(energy, IterationEnergy):
        joules = f"{quantity(energy.energy_j, 'J')} ± {quantity(energy.uncertainty_j, 'J')}"
        net = "not known" if energy.net_j is None else quantity(energy.net_j, "J")
        if energy.net_uncertainty_j is not None:
            net += f" ± {quantity(energy.net_uncertainty_j, 'J')}"
        kind = f"measured: {energy.origin.meter}, {energy.origin.boundary}"
    elif isinstance(energy, EnergyModelled):
        low, high = energy.modelled_low_j, energy.modelled_high_j
        joules = (
            f"{quantity(energy.modelled_j, 'J')}, {quantity(low, 'J')} to {quantity(high, 'J')}"
        )
        kind = f"modelled, not measured: {energy.boundary}"
    else:
        joules, kind = "-", f"none: {energy.reason}"
    cells = (
        quantity(figures.median_s, "s"), quantity(figures.p90_s, "s"),
        f"{figures.spread_relative:.1%}", joules, net, kind,
    )  # fmt: skip
    return dict(zip(_ROWS, cells, strict=True))


def _method(results: Results) -> Iterable[tuple[str, str]]:
    asked = results.configuration
    windows = (
        f"{asked.repeats} of forwards and {asked.repeats} of steps per cut, of at least "
        f"{window_target_s(asked):g} s each, after a warm-up that is not counted"
    )
    figures = (
        "latency: median over the windows of each window's median; 90 %: of all timed iterations; "
        "spread: highest less lowest window, of the median; energy: median over the windows, of "
        "the same windows as the latency"
    )
    step = (
        f"2 x {asked.directions} + 1 forwards of a batch of {asked.batch}, their perturbations, "
        f"frames encoded in {asked.encoding}"
    )
    yield from {"mode": asked.mode, "windows": windows, "figures": figures, "a step": step}.items()
    yield "threads", str(asked.threads)
    yield "profile", asked.profile or "none"
    yield from _energy_method(results)
    if asked.gpio:
        yield "edge", f"GPIO {asked.gpio} is high during every window of forwards and steps"


def _energy_method(results: Results) -> Iterable[tuple[str, str]]:
    origin, power = results.environments[0].meter, results.configuration.model_power
    if origin is None:
        if power is not None:
            text = f"{power.idle_w:.2f} W idle, {power.busy_w:.2f} W computing, {power.boundary}"
            yield "energy model", f"{text}: profile {power.board}; {power.source}"
        return
    kind = "of the moment" if origin.reading == "instant" else "means"
    text = f"{origin.meter} ({origin.driver}), boundary {origin.boundary}, readings are {kind}"
    text += f", {results.configuration.rate_hz:g} Hz asked for"
    yield "meter", f"{text}; within {origin.uncertainty_relative:.2%}: {origin.uncertainty_source}"
    for cut in results.cuts:
        energy = cut.step.energy if cut.step is not None else None
        if isinstance(energy, IterationEnergy):
            idle = "not measured" if energy.idle_w is None else quantity(energy.idle_w, "W")
            text = f"at least {energy.fewest_samples} a window, {energy.lowest_rate_hz:.1f} Hz, "
            text += f"largest gap {quantity(energy.largest_gap_s, 's')}; power in a step "
            text += f"{quantity(energy.mean_w, 'W')}; idle {idle}, with the program loaded"
            yield f"samples, {cut.cut}", text


def _machine(results: Results) -> Iterable[tuple[str, str]]:
    first = results.environments[0]
    yield "board", first.board or "the machine names none"
    yield "processor", f"{first.processor}, {first.cores} cores, {first.machine}"
    yield "memory", _bytes(first.memory_bytes)
    yield "system", f"{first.system or 'not known'}, kernel {first.kernel}"
    yield "clock governor", first.governor or "the kernel does not tell"
    yield "versions", ", ".join(f"{name} {number}" for name, number in first.versions.items())
    yield "sessions", ", ".join(e.started for e in results.environments)


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="facts">{cells}</table>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _bytes(count: int) -> str:
    return quantity(float(count), "B")
