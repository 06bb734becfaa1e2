"""The cut table of a model as the planner needs it: both halves' sizes, FLOPs and activations."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import fx

from export.cuts import boundaries
from export.inputs import SampleArray
from export.listing import list_cuts
from export.models import BuiltModel, build_model
from export.tracing import trace
from server_node.config import Config
from server_node.samples import Dataset
from server_node.transform import declare, explained

_FLOAT_BYTES = 4


class CutCost(NamedTuple):
    """A legal cut. FLOPs are those of one forward of one sample."""

    cut: str
    d_c: int
    d_s: int
    activation_shape: tuple[int, ...]
    client_flops: int
    server_flops: int
    inner_bytes: int  # a sample: the largest sum of what one operation of the device half holds

    @property
    def activation_bytes(self) -> int:
        """Of one sample in float32."""
        return _FLOAT_BYTES * math.prod(self.activation_shape)


class ModelCuts(NamedTuple):
    """The cuts of a model in order; of those that learn the same, the one that sends least."""

    cuts: list[CutCost]
    input_bytes: int  # of a prepared sample
    source: bytes  # of the user's own file


def model_cuts(config: Config, data: Dataset) -> ModelCuts:
    """Trace the configuration's model for the data. Raises ModelError, ConfigError."""
    declared = declare(config.data, data.x_train, ["float32"] * len(data.x_train))
    arrays = [
        SampleArray(have.raw_shape, x.dtype.kind in "bui", have.transform)
        for x, have in zip(data.x_train, declared, strict=True)
    ]
    with explained(config, declared[0]):
        model = build_model(config.model.name, config.run.seed, config.model.input_shape, arrays)
    listed = list_cuts(model)
    inner = _inner_bytes(model)
    costs: dict[tuple[int, int], CutCost] = {}
    for facts in listed.cuts:
        cost = CutCost(
            facts.cut, facts.parameters_client, facts.parameters_server, facts.activation_shape,
            facts.client_flops_per_sample,
            listed.flops_per_sample - facts.client_flops_per_sample, inner[facts.cut],
        )  # fmt: skip
        # Between them lies nothing that learns or computes (a ReLU, a pooling): what sends least.
        key = cost.d_c, cost.client_flops
        if key not in costs or cost.activation_bytes <= costs[key].activation_bytes:
            costs[key] = cost
    inputs = sum(_FLOAT_BYTES * math.prod(i.shape) for i in model.inputs)
    return ModelCuts(list(costs.values()), inputs, model.source or b"")


def _inner_bytes(model: BuiltModel) -> dict[str, int]:
    """Cut -> bytes a sample of the operation that holds most: its inputs and its result."""
    traced = trace(model)

    def held(node: fx.Node) -> int:
        tensors = [n for n in (node, *node.all_input_nodes) if n in traced.dependent]
        return _FLOAT_BYTES * sum(map(_elements, tensors))

    return {
        place.name: max(map(held, place.client), default=0)
        for place in boundaries(traced)
        if not place.fault
    }


def _elements(node: fx.Node) -> int:
    shape = getattr(node.meta.get("val"), "shape", ())
    return math.prod(n for n in shape[1:] if type(n) is int) if len(shape) else 0
