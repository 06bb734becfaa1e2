"""A small writer of SVG charts: no package, no script, every text escaped.

Charts are as wide as a phone, so that their letters can be read there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final, Literal, NamedTuple

WIDTH: Final = 440
_FONT: Final = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"
_CHARACTER: Final = 6.6  # width of a letter at 12 px, about
INK: Final = "#1f2933"
FAINT: Final = "#d5dae1"
MUTED: Final = "#616e7c"

Anchor = Literal["start", "middle", "end"]


class Scale(NamedTuple):
    """Values low .. high to pixels from .. to."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


class Canvas:
    """Elements of one drawing."""

    def __init__(self, height: float, title: str) -> None:
        """`title` is what a screen reader says of the drawing."""
        self._height = height
        self._title = title
        self._parts: list[str] = []

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1
    ) -> None:
        """A straight line."""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width:g}"/>'
        )

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, *, outline: str = ""
    ) -> None:
        """A bar; with `outline` a dashed one."""
        dashes = f' stroke="{outline}" stroke-dasharray="3 2"' if outline else ""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
            f'rx="2" fill="{fill}"{dashes}/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str, *, outline: str = "") -> None:
        """A dot."""
        stroke = f' stroke="{outline}"' if outline else ""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}"{stroke}/>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A line through points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5" '
            'stroke-linejoin="round"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, anchor: Anchor = "start", colour: str = INK,
        size: int = 12, bold: bool = False,
    ) -> None:  # fmt: skip
        """A line of text; `y` is its base line."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
            f'font-size="{size}"{weight}>{escape(words)}</text>'
        )

    def render(self) -> str:
        """The drawing as an element that stands alone or in a page."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height:.0f}" '
            f'role="img" aria-label="{escape(self._title)}" style="{_FONT}">'
            f"<title>{escape(self._title)}</title>{''.join(self._parts)}</svg>"
        )


def ticks(high: float, low: float = 0.0, about: int = 4) -> list[float]:
    """Round values from at most `low` to at least `high`."""
    span = high - low if high > low else abs(high) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def quantity(value: float, unit: str) -> str:
    """Three digits with an SI prefix: 0.00123 s -> 1.23 ms."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    prefix, factor = prefixed(value)
    return f"{_digits(value / factor)} {prefix}{unit}"


def prefixed(value: float) -> tuple[str, float]:
    """The SI prefix that suits a value, and its factor."""
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3)):
        if abs(value) >= 0.9995 * factor:
            return prefix, factor
    return ("\N{MICRO SIGN}", 1e-6) if abs(value) >= 0.9995e-6 else ("n", 1e-9)


def shortened(words: str, width: float) -> str:
    """The words, cut in their middle to fit `width` pixels."""
    room = max(5, int(width / _CHARACTER))
    if len(words) <= room:
        return words
    half = (room - 1) // 2
    return f"{words[:half]}…{words[-(room - 1 - half) :]}"


def _digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) * 1.0005)))}f}"
