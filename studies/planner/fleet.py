"""The FLEET file: what devices, links and server can do, and what the planner may choose from.

docs/planner.md explains every field. What is said here is what `[simulation]` of a run can say,
so that a plan's fleet can be simulated as it is.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from server_node.config import explain
from server_node.sections import AtLeast1, NotNegative, Positive, Seconds, Section
from studies.planner.errors import FleetFileError
from wire_protocol.encodings import Encoding

Sizes = Annotated[list[AtLeast1], Meta(min_length=1, max_length=32)]
Bytes = Annotated[int, Meta(ge=1, le=1 << 50)]


class DeviceKind(Section, frozen=True):
    """So many devices of one kind. One of `flops_per_s` and `forward_s` says how fast they are."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    memory_bytes: Bytes  # what the device program may take in all
    up_bytes_s: Positive
    down_bytes_s: Positive
    count: AtLeast1 = 1
    flops_per_s: NotNegative = 0.0
    # cut -> seconds of a forward of one batch, measured
    forward_s: dict[str, Seconds] = field(default_factory=dict)


class Delays(Section, frozen=True):
    """How a device's seconds vary from round to round around their mean; as [simulation]."""

    model: Literal["constant", "exponential", "uniform"] = "constant"
    spread: Annotated[float, Meta(ge=0, le=1)] = 0.5
    latency_s: Seconds = 0.0


class Server(Section, frozen=True):
    """How fast the server steps. One of `step_s` and `flops_per_s`."""

    mode: Literal["serial", "parallel"] = "serial"
    step_s: NotNegative = 0.0  # with K_s = 1, whatever the cut
    measure_s: Seconds = 0.0  # a direction of a device; beside step_s only
    flops_per_s: NotNegative = 0.0
    memory_bytes: Bytes = 1 << 50


class Search(Section, frozen=True):
    """What may be chosen. Without cuts: all legal ones."""

    cuts: list[str] = field(default_factory=list)
    tau: Sizes = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    directions_client: Sizes = field(default_factory=lambda: [1, 4, 8, 16, 32])
    directions_server: Sizes = field(default_factory=lambda: [1])
    encoding: Annotated[list[Encoding], Meta(min_length=1)] = field(
        default_factory=lambda: ["float32", "int8"]
    )
    perturb: Annotated[list[list[str]], Meta(min_length=1)] = field(default_factory=lambda: [[]])
    # Of the training set; probes are scored on it, never on the test set.
    holdout: Annotated[float, Meta(gt=0, lt=1)] = 0.2


class Fleet(Section, frozen=True):
    """One fleet file."""

    device: Annotated[list[DeviceKind], Meta(min_length=1)]
    server: Server
    delays: Delays = Delays()
    search: Search = Search()

    @property
    def kinds(self) -> list[DeviceKind]:
        """The kind of device 0, 1, ..: in the order of the file."""
        return [kind for kind in self.device for _ in range(kind.count)]


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file. Raises FleetFileError, one line that names the field."""
    try:
        fleet = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Fleet)
    except OSError as error:
        raise FleetFileError(f"{path}: cannot be read ({error.strerror})") from error
    except msgspec.ValidationError as error:
        raise FleetFileError(f"{path}: {explain(error)}; see docs/planner.md") from error
    except (ValueError, RecursionError) as error:  # numbers too long, nests too deep
        raise FleetFileError(f"{path}: not TOML: {error}") from error
    names = [kind.name for kind in fleet.device]
    for kind in fleet.device:
        if bool(kind.flops_per_s) == bool(kind.forward_s):
            raise FleetFileError(f"{path}: device {kind.name}: needs flops_per_s or forward_s")
        if names.count(kind.name) > 1:
            raise FleetFileError(f"{path}: device.name: {kind.name!r} stands there twice")
    if bool(fleet.server.step_s) == bool(fleet.server.flops_per_s):
        raise FleetFileError(f"{path}: server: needs step_s or flops_per_s")
    return fleet
