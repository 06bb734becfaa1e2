"""What the measuring and the measured process say to each other: one JSON line each.

Apart from the measured process, so that who orders does not import ONNX Runtime.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from wire_protocol.encodings import Encoding


class Task(msgspec.Struct, frozen=True):
    """What to load."""

    folder: str
    batch: int
    directions: int
    lam: float
    encoding: Encoding
    threads: int
    gpio: str


class Order(msgspec.Struct, frozen=True):
    """One window: at least `window_s` seconds and `iterations` iterations."""

    kind: Literal["idle", "forward", "step"]
    window_s: float
    iterations: int
    edge: bool  # drive the GPIO line


class Done(msgspec.Struct, frozen=True, tag="done"):
    """How it went; see records.Window and records.Latencies. Rows are those of latency.csv."""

    begin_s: float
    end_s: float
    iterations: int
    cpu_s: float
    rss_bytes: int
    peak_rss_bytes: int
    frame_bytes: int
    rows: list[tuple[int, float, float, float, float]]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The first answer: loaded."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Instead of it: why the bundle cannot be measured."""

    text: str
