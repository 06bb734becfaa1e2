"""results.json, plots/ and report.html from the raw files alone; and the one-page report itself.

The page holds everything: no script, nothing from elsewhere, every text escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final, Literal

import msgspec

from edge_client.bench.evidence import MANIFEST_FILE, Evidence
from edge_client.bench.plots import all_plots
from edge_client.bench.records import window_target_s
from edge_client.bench.results import (
    CutResult,
    Figures,
    IterationEnergy,
    Results,
    compute_results,
)
from edge_client.bench.svg import quantity
from edge_client.files import replacing
from wire_protocol.energy import EnergyModelled

RESULTS_FILE: Final = "results.json"
REPORT_FILE: Final = "report.html"
PLOTS_FOLDER: Final = "plots"
_STYLE: Final = """
:root{color-scheme:light}
body{margin:0 auto;max-width:1000px;padding:16px;background:#fff;color:#1f2933;
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
h1{font-size:1.5em;line-height:1.2;margin:.3em 0}h2{font-size:1.15em;margin:1.6em 0 .5em}
p,ul{margin:.5em 0}ul{padding-left:1.2em}
.verdict{border-left:5px solid;padding:.6em .9em;margin:1em 0;border-radius:3px}
.good{border-color:#2f855a;background:#f0f9f4}.bad{border-color:#c53030;background:#fdf3f3}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:.35em .7em .35em 0;text-align:left;vertical-align:top;border-bottom:1px solid #e4e7eb}
th{font-weight:600;color:#52606d}td.n,th.n{text-align:right;white-space:nowrap}
.facts th{width:13em}.facts td{overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:18px}
.plots svg{width:100%;height:auto;display:block}
.soft{color:#616e7c;font-size:13px}code{font-size:.92em;overflow-wrap:anywhere}
@media print{body{padding:0}.plots svg{break-inside:avoid}}
"""


class Written(msgspec.Struct, frozen=True):
    """What `write_report` did to a derived file."""

    path: Path
    change: Literal["unchanged", "written", "rewritten"]


def write_report(evidence: Evidence) -> tuple[Results, list[Written]]:
    """Compute and write everything that is derived. Raises EvidenceError."""
    results = compute_results(evidence)
    plots = all_plots(evidence, results)
    files = {RESULTS_FILE: msgspec.json.format(msgspec.json.encode(results)).decode() + "\n"}
    files |= {f"{PLOTS_FOLDER}/{name}.svg": svg + "\n" for name, svg in plots.items()}
    files[REPORT_FILE] = _page(results, list(plots.values()))
    (evidence.folder / PLOTS_FOLDER).mkdir(exist_ok=True)
    return results, [_replace(evidence.folder / name, text) for name, text in files.items()]


def _replace(path: Path, text: str) -> Written:
    data = text.encode()
    there = path.read_bytes() if path.is_file() else None
    if there == data:
        return Written(path, "unchanged")
    with replacing(path) as file:
        file.write(data)
    return Written(path, "written" if there is None else "rewritten")


def _page(results: Results, plots: Sequence[str]) -> str:
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
            ('<p class="soft">Bars: median. White dots: the median of each window. Whisker: to the '
            "90th percentile for latency, the uncertainty (coverage factor 2) for measured energy, "
            "the bounds of the model for modelled energy, which is drawn hollow.</p>"),
            "<h2>How it was measured</h2>",
            _facts(_method(results)),
            "<h2>On what</h2>",
            _facts(_machine(results)),
            "<h2>Checking it</h2>",
            (f"<p>Digest of the evidence: <code>{results.evidence_sha256}</code>, the SHA-256 of "
            f"<code>{MANIFEST_FILE}</code>, which names every raw file with its own. "
            "<code>musplit report FOLDER</code> checks them all and makes this page again, byte "
            f"for byte; <code>sha256sum --check {MANIFEST_FILE}</code> checks without musplit.</p>"),
            "</body></html>\n",
        ]
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
    rows = [
        _row(what, figures)
        for what, figures in (("forward", cut.forward), ("step", cut.step))
        if figures is not None
    ]
    header = (
        "<tr><th></th><th class=n>median</th><th class=n>90 %</th><th class=n>spread</th>"
        "<th class=n>energy</th><th class=n>net of idle</th><th>kind</th></tr>"
    )
    table = f'<div class="scroll"><table>{header}{"".join(rows)}</table></div>'
    return (
        f"<h3>{escape(cut.model)}, cut at {escape(cut.cut)}</h3>"
        + (table if rows else "<p>No window was taken.</p>")
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


def _row(what: str, figures: Figures) -> str:
    energy = figures.energy
    if isinstance(energy, IterationEnergy):
        joules = f"{quantity(energy.energy_j, 'J')} ± {quantity(energy.uncertainty_j, 'J')}"
        net = "not known" if energy.net_j is None else quantity(energy.net_j, "J")
        kind = f"measured: {energy.origin.meter}, {energy.origin.boundary}"
    elif isinstance(energy, EnergyModelled):
        low, high = energy.modelled_low_j, energy.modelled_high_j
        joules = f"{quantity(energy.modelled_j, 'J')} ({quantity(low, 'J')}–{quantity(high, 'J')})"
        net, kind = "–", f"modelled, {energy.boundary}"
    else:
        joules, net, kind = "–", "–", f"none: {energy.reason}"
    return (
        f"<tr><th>{what}</th><td class=n>{quantity(figures.median_s, 's')}</td>"
        f"<td class=n>{quantity(figures.p90_s, 's')}</td>"
        f"<td class=n>{figures.spread_relative:.1%}</td><td class=n>{joules}</td>"
        f"<td class=n>{net}</td><td>{escape(kind)}</td></tr>"
    )


def _method(results: Results) -> Iterable[tuple[str, str]]:
    asked = results.configuration
    yield "mode", asked.mode
    yield (
        "windows",
        (f"{asked.repeats} of forwards and {asked.repeats} of steps per cut, of at least "
        f"{window_target_s(asked):g} s each, after a warm-up that is not counted"),
    )
    yield (
        "figures",
        ("latency: median over the windows of each window's median; 90 %: of all timed iterations; "
        "spread: highest less lowest window, of the median; energy: median over the windows, "
        "from the same windows as the latency"),
    )
    yield (
        "a step",
        (f"2 x {asked.directions} + 1 forwards of a batch of {asked.batch}, their perturbations, "
        f"differences encoded in {asked.encoding}"),
    )
    yield "threads", str(asked.threads)
    yield "profile", asked.profile or "none"
    yield from _energy_method(results)
    if asked.gpio:
        yield "edge", f"GPIO {asked.gpio} is high during every window of forwards and steps"


def _energy_method(results: Results) -> Iterable[tuple[str, str]]:
    origin, power = results.environments[0].meter, results.configuration.model_power
    if origin is not None:
        yield (
            "meter",
            (f"{origin.meter} ({origin.driver}), boundary {origin.boundary}, readings are "
            f"{'of the moment' if origin.reading == 'instant' else 'means'}, "
            f"{origin.rate_hz:g} Hz asked for; uncertainty {origin.uncertainty_relative:.2%}: "
            f"{origin.uncertainty_source}"),
        )
        for cut in results.cuts:
            energy = cut.step.energy if cut.step is not None else None
            if isinstance(energy, IterationEnergy):
                idle = "not measured" if energy.idle_w is None else quantity(energy.idle_w, "W")
                yield (
                    f"samples, {cut.cut}",
                    (f"at least {energy.fewest_samples} a window at {energy.lowest_rate_hz:.1f} Hz, "
                    f"largest gap {quantity(energy.largest_gap_s, 's')}; power in a step "
                    f"{quantity(energy.mean_w, 'W')}, idle {idle} with the program loaded"),
                )
    elif power is not None:
        yield (
            "energy model",
            (f"{power.idle_w:g} W idle, {power.load_w:g} W loaded, {power.boundary}: "
            f"{power.source}; utilisation is processor time over time and cores"),
        )


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
