"""All cuts of a model: what each costs a device and the wire, and why the others are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from export.cuts import Boundary, Half, boundaries, cut_traced
from export.inputs import example
from export.models import BuiltModel
from export.server_half import ModelInput
from export.tracing import quiet, trace
from wire_protocol.manifest import InputSpec

_FLOAT_BYTES: Final = 4


class CutFacts(NamedTuple):
    """A legal cut. FLOPs are those of one forward pass of the client half."""

    cut: str
    other_names: list[str]
    parameters_client: int
    parameters_server: int
    activation_shape: tuple[int, ...]
    activation_bytes_per_sample: int
    client_flops_per_sample: int


class CutList(NamedTuple):
    """Legal cuts, and names of boundaries that are none with the reason; in order of execution."""

    model: str
    flops_per_sample: int  # of the whole model
    cuts: list[CutFacts]
    illegal: list[tuple[str, str]]


def list_cuts(model: BuiltModel) -> CutList:
    """Every boundary of a model. Raises ModelError."""
    traced = trace(model)
    places = boundaries(traced)

    def facts(place: Boundary) -> CutFacts:
        halves = cut_traced(traced, place.name)
        elements = math.prod(halves.activation_shape)
        return CutFacts(
            place.name, place.names[1:], _count(halves.client), _count(halves.server),
            halves.activation_shape, elements * _FLOAT_BYTES,
            forward_flops(halves.client, model.inputs),
        )  # fmt: skip

    return CutList(
        model.name,
        forward_flops(Half(model.module, {}, {}), model.inputs),
        [facts(place) for place in places if not place.fault],
        [(place.name, place.fault) for place in places if place.fault],
    )


def table(cuts: CutList) -> str:
    """The list for people."""
    rows = [("cut", "d_c", "d_s", "activation", "bytes/sample", "client FLOPs/sample")]
    rows += [
        (
            c.cut, f"{c.parameters_client:,}", f"{c.parameters_server:,}",
            "x".join(map(str, c.activation_shape)) or "1", f"{c.activation_bytes_per_sample:,}",
            f"{c.client_flops_per_sample:,}",
        )
        for c in cuts.cuts
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    if cuts.illegal:
        lines += ["", "no cut there:"]
        wide = max(len(name) for name, _ in cuts.illegal)
        lines += [f"{name.ljust(wide)}  {why}" for name, why in cuts.illegal]
    return "\n".join(lines)


def as_json(cuts: CutList) -> dict[str, Any]:
    """The list for programs."""
    return {
        "model": cuts.model,
        "flops_per_sample": cuts.flops_per_sample,
        "cuts": [c._asdict() for c in cuts.cuts],
        "illegal": [{"name": name, "reason": why} for name, why in cuts.illegal],
    }


def _count(half: Half) -> int:
    return sum(p.numel() for p in half.module.parameters())


def forward_flops(client: Half, inputs: Sequence[ModelInput] | Sequence[InputSpec]) -> int:
    """Of one sample: multiplications and additions, each counted, of products and convolutions."""
    # Fused attention and recurrent kernels are not counted: their plain forms are.
    with (
        quiet(),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
    ):
        client.module(*example(inputs, 1))
    return int(counter.get_total_flops())
