"""What a board's TOML file holds: frozen structs, every number with its source and confidence.

docs/profiles.md explains every field. `confidence` is how a number came to be here:

measured    by `musplit bench`, on the board itself
published   somebody else measured it and says how
vendor      a data sheet's or the maker's
assumed     nobody measured it; the source says what the assumption rests on
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Confidence = Literal["measured", "vendor", "published", "assumed"]
# Where power was measured: behind the regulators, at the board's supply pins, at the socket.
Boundary = Literal["soc-rails", "board-dc", "wall-ac"]
FirstBoot = Literal["firstrun", "cloud-init", "rpi-preseed", "jetson-overlay", "none"]
Sensor = Literal[
    "pmic", "ina219", "ina226", "ina260", "ina3221", "rapl", "usb-csv", "bench-csv", "plug-http",
    "plug-mqtt", "model",
]  # fmt: skip
Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}\Z")]
Text = Annotated[str, Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0, lt=1e15)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Release = Annotated[str, Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})*\Z")]
Glibc = Annotated[str, Meta(pattern=r"^2\.[0-9]{1,3}\Z")]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file; a field that nobody knows is an error."""


class Figure(Table, frozen=True):
    """A number; its unit is in the name of the field that holds it."""

    value: Positive
    source: Text
    confidence: Confidence


class Watts(Table, frozen=True):
    """A power draw, and where it was measured."""

    value_w: Positive
    boundary: Boundary
    source: Text
    confidence: Confidence


class Cpu(Table, frozen=True):
    """The processor."""

    model: Text
    architecture: Literal["aarch64", "x86_64"]
    cores: Count
    clock_hz: Figure
    features: list[Text]  # as in /proc/cpuinfo; a board of this kind has at least these
    qemu_cpu: str = ""  # name of `qemu-aarch64 -cpu`; empty: none stands for it


class LinkFigures(Table, frozen=True):
    """The network as applications see it, not the radio's nominal rate."""

    kind: Text
    up_bits_s: Figure
    down_bits_s: Figure
    latency_s: Figure  # one way


class Image(Table, frozen=True):
    """An operating system image, and how a Python that musplit supports gets there."""

    name: Name
    release: Text
    python: Release  # the system's own
    glibc: Glibc
    first_boot: FirstBoot
    supported: bool
    remedy: Text  # supported: how Python and musplit get there; otherwise: why not, what instead
    source: Text
    onnxruntime: Release | None = None  # the pin for this Python, where it is another


class Crash(Table, frozen=True):
    """A version of onnxruntime not to use on this board."""

    version: Release
    why: Text
    source: Text


class Runtime(Table, frozen=True):
    """How ONNX Runtime is set up on this board."""

    onnxruntime: Release  # the pin that works
    source: Text
    confidence: Confidence
    crashes: list[Crash] = []
    provider: Text = "CPUExecutionProvider"
    threads: Count = 1
    arena: bool = True  # small models are faster with it, large ones need less memory without


class Power(Table, frozen=True):
    """Sensors in order of preference, and the model for when there is none."""

    sensors: Annotated[list[Sensor], Meta(min_length=1)]
    idle: Watts
    load: Watts  # all cores busy


class Calibrated(Table, frozen=True):
    """A step of one client graph, whatever its weights, as measured on this very board."""

    graph: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # SHA-256 of the bundle's client.onnx
    cut: str
    batch: Count
    threads: Count
    directions: Count  # K: a step is 2 K + 1 forwards, with their perturbations
    step_s: Positive  # median, without encoding, sending and waiting
    source: Text  # the evidence folder


class Speed(Table, frozen=True):
    """How fast a step is. `factor` is its time here / on the reference, a Raspberry Pi 4B.

    Both with the threads of their profiles. An entry of `calibrated` that fits the run stands
    instead of the factor.
    """

    factor: Figure
    calibrated: list[Calibrated] = []


class Profile(Table, frozen=True):
    """One board."""

    name: Name
    title: Text
    kind: Literal["raspberry-pi", "jetson", "laptop"]
    cpu: Cpu
    memory_mb: Annotated[list[Count], Meta(min_length=1)]  # of the variants that are sold
    link: LinkFigures
    images: Annotated[list[Image], Meta(min_length=1)]
    runtime: Runtime
    power: Power
    speed: Speed
