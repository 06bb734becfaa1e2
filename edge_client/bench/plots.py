"""The plots of a bench: latency, energy, power over time, and the machine's conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from edge_client.bench.evidence import Evidence
from edge_client.bench.records import Kind, places
from edge_client.bench.results import CutResult, Figures, IterationEnergy, Results, WindowResult
from edge_client.bench.svg import (
    FAINT,
    INK,
    MUTED,
    WIDTH,
    Canvas,
    Scale,
    prefixed,
    quantity,
    shortened,
    ticks,
)
from wire_protocol.energy import EnergyModelled

FORWARD: Final = "#2b6cb0"
STEP: Final = "#c05621"
MODELLED: Final = "#edf0f3"
_LEFT: Final = 14.0
_RIGHT: Final = WIDTH - 14.0
_TOP: Final = 34.0
_ROW: Final = 40.0
_COLOURS: Final[dict[Kind, str]] = {"idle": MUTED, "forward": FORWARD, "step": STEP}
_POINTS: Final = 500


class _Bar(NamedTuple):
    """A row of a chart of bars."""

    label: str
    value: float
    low: float
    high: float
    solid: bool
    dots: Sequence[float] = ()


def all_plots(evidence: Evidence, results: Results) -> dict[str, str]:
    """SVG by name: in plots/ and in the report, in this order."""
    plots: dict[str, str] = {}
    for kind, what in (("forward", "forward of a batch"), ("step", "step")):
        latencies, energies = _latency_bars(results, kind), _energy_bars(results, kind)
        if latencies:
            plots[f"latency-{kind}"] = _bars(f"Latency of one {what}", latencies, "s", kind)
        if energies:
            plots[f"energy-{kind}"] = _bars(f"Energy of one {what}", energies, "J", kind)
    for number, cut in enumerate(results.cuts):
        power = _power(evidence, cut)
        if power:
            plots[f"power-cut{number}"] = power
    for name, title, unit in (
        ("temperature", "Temperature after each window", "°C"),
        ("frequency", "Clock frequency after each window", "Hz"),
    ):
        drawn = _conditions(results, name, title, unit)
        if drawn:
            plots[name] = drawn
    return plots


def _figures(cut: CutResult, kind: str) -> Figures | None:
    return cut.forward if kind == "forward" else cut.step


def _latency_bars(results: Results, kind: str) -> list[_Bar]:
    bars = []
    for cut in results.cuts:
        figures = _figures(cut, kind)
        if figures is not None:
            dots = [w.median_s for w in cut.windows if _is(w, kind) and w.median_s is not None]
            high = max(figures.p90_s, figures.median_s)
            bars.append(_Bar(cut.cut, figures.median_s, figures.median_s, high, True, dots))
    return bars


def _energy_bars(results: Results, kind: str) -> list[_Bar]:
    bars = []
    for cut in results.cuts:
        figures = _figures(cut, kind)
        energy = figures.energy if figures is not None else None
        if isinstance(energy, IterationEnergy):
            joules, bound = energy.energy_j, energy.uncertainty_j
            bars.append(_Bar(cut.cut, joules, max(0.0, joules - bound), joules + bound, solid=True))
        elif isinstance(energy, EnergyModelled):
            bars.append(
                _Bar(
                    f"{cut.cut} (modelled)", energy.modelled_j, energy.modelled_low_j,
                    energy.modelled_high_j, solid=False,
                )
            )  # fmt: skip
    return bars


def _bars(title: str, bars: Sequence[_Bar], unit: str, kind: str) -> str:
    height = _TOP + _ROW * len(bars) + 26
    canvas = Canvas(height, title)
    canvas.text(_LEFT, 18, title, bold=True, size=14)
    values = ticks(max(max(b.high, b.value, *b.dots) for b in bars))
    scale = Scale(values[0], values[-1], _LEFT, _RIGHT - 18)
    bottom = _TOP + _ROW * len(bars)
    prefix, factor = prefixed(values[-1])
    for value in values:
        canvas.line(scale.at(value), _TOP, scale.at(value), bottom, FAINT)
        words = f"{value / factor:g}" + (f" {prefix}{unit}" if value == values[-1] else "")
        canvas.text(scale.at(value), bottom + 16, words, anchor="middle", colour=MUTED, size=11)
    colour = FORWARD if kind == "forward" else STEP
    for row, bar in enumerate(bars):
        y = _TOP + _ROW * row
        canvas.text(_LEFT, y + 14, shortened(bar.label, 270))
        canvas.text(_RIGHT, y + 14, quantity(bar.value, unit), anchor="end", bold=True)
        fill, outline = (colour, "") if bar.solid else (MODELLED, MUTED)
        canvas.rectangle(_LEFT, y + 20, scale.at(bar.value) - _LEFT, 12, fill, outline=outline)
        _whisker(canvas, scale.at(bar.low), scale.at(bar.high), y + 26)
        for dot in bar.dots:
            canvas.circle(scale.at(dot), y + 26, 2.5, "#fff", outline=INK)
    return canvas.render()


def _whisker(canvas: Canvas, low: float, high: float, y: float) -> None:
    if high - low < 1:
        return
    canvas.line(low, y, high, y, INK, 1.5)
    for x in (low, high):
        canvas.line(x, y - 4, x, y + 4, INK, 1.5)


def _power(evidence: Evidence, cut: CutResult) -> str:
    """Watts in the median step window of a cut; empty when there is none."""
    steps = sorted(
        (w for w in cut.windows if _is(w, "step") and w.mean_w is not None),
        key=lambda w: (w.mean_w, w.name),
    )
    if not steps:
        return ""
    chosen = steps[len(steps) // 2].name
    place = next(p for p in places(evidence.configuration) if p.name == chosen)
    window, power = evidence.window(place), evidence.power(place)
    assert power is not None
    stride = -(-len(power[0]) // _POINTS)
    times_s = [t - window.begin_s for t in power[0][::stride]]
    powers_w = power[1][::stride]
    return _line_chart(
        f"Power in window {place.name}: {cut.cut}", times_s, powers_w, ("s", "W"),
        (0.0, window.seconds), cut.idle_w,
    )  # fmt: skip


def _line_chart(
    title: str, xs: Sequence[float], ys: Sequence[float], units: tuple[str, str],
    marked: tuple[float, float], level: float | None,
) -> str:  # fmt: skip
    """A curve over time; `marked` is shaded, `level` a horizontal line with its name."""
    canvas = Canvas(210, title)
    canvas.text(_LEFT, 18, shortened(title, 410), bold=True, size=14)
    values = ticks(max(*ys, level or 0.0))
    across, up = (
        Scale(min(xs), max(xs), _LEFT + 34, _RIGHT),
        Scale(values[0], values[-1], 180, _TOP + 6),
    )
    canvas.rectangle(
        across.at(marked[0]), up.end, across.at(marked[1]) - across.at(marked[0]),
        up.begin - up.end, "#f3f5f7",
    )  # fmt: skip
    for value in values:
        canvas.line(across.begin, up.at(value), across.end, up.at(value), FAINT)
        words = f"{value:g}" + (f" {units[1]}" if value == values[-1] else "")
        canvas.text(across.begin - 5, up.at(value) + 4, words, anchor="end", colour=MUTED, size=11)
    for value in ticks(max(xs)):
        if value <= max(xs):
            canvas.text(
                across.at(value), 197, f"{value:g} {units[0]}", anchor="middle", colour=MUTED,
                size=11,
            )  # fmt: skip
    if level is not None:
        canvas.line(across.begin, up.at(level), across.end, up.at(level), MUTED, 1.5)
        canvas.text(
            across.end, up.end - 6, f"grey line: idle {quantity(level, 'W')}", anchor="end",
            colour=MUTED, size=11,
        )  # fmt: skip
    canvas.path([(across.at(x), up.at(y)) for x, y in zip(xs, ys, strict=True)], STEP)
    return canvas.render()


def _conditions(results: Results, name: str, title: str, unit: str) -> str:
    """A reading after each window, in their order; empty when the machine tells none."""
    rows = [
        (w, value)
        for cut in results.cuts
        for w in cut.windows
        if (value := w.temperature_after_c if name == "temperature" else w.frequency_after_hz)
        is not None
    ]
    if not rows:
        return ""
    canvas = Canvas(170, title)
    canvas.text(_LEFT, 18, title, bold=True, size=14)
    high = max(value for _, value in rows)
    prefix, factor = prefixed(high) if unit == "Hz" else ("", 1.0)
    values = ticks(high)
    up = Scale(values[0], values[-1], 140, _TOP + 6)
    across = Scale(-0.5, len(rows) - 0.5, _LEFT + 44, _RIGHT)
    for value in values:
        canvas.line(across.begin, up.at(value), across.end, up.at(value), FAINT)
        words = f"{value / factor:g}" + (f" {prefix}{unit}" if value == values[-1] else "")
        canvas.text(across.begin - 5, up.at(value) + 4, words, anchor="end", colour=MUTED, size=11)
    canvas.path([(across.at(x), up.at(value)) for x, (_, value) in enumerate(rows)], FAINT)
    for x, (window, value) in enumerate(rows):
        canvas.circle(across.at(x), up.at(value), 3, _COLOURS[_kind(window)])
    left = across.begin
    for kind in ("idle", "forward", "step"):
        if any(_is(window, kind) for window, _ in rows):
            canvas.circle(left + 4, 157, 3, _COLOURS[kind])
            canvas.text(left + 11, 161, kind, colour=MUTED, size=11)
            left += 64
    return canvas.render()


def _kind(window: WindowResult) -> Kind:
    return next(kind for kind in _COLOURS if _is(window, kind))


def _is(window: WindowResult, kind: str) -> bool:
    return f"-{kind}-" in window.name
