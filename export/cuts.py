"""Cutting a traced model in two after a module, wherever a single tensor crosses.

The client half is everything that the module's output depends on, the server half the rest. What
depends on no input (a mask, positions) is computed on both sides; sizes that follow the batch are
taken from the tensor that crosses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn

from export.errors import CutError, ModelError
from export.models import BuiltModel
from export.tracing import Traced, ancestors, is_batch, is_size, module_stack, trace, where
from wire_protocol.frames import MAX_DIMS

# Legal cuts that an error lists.
_MANY: Final = 12


class Half(NamedTuple):
    """One half: a module, and the whole model's name for each of its state tensors, in order."""

    module: nn.Module
    parameter_names: dict[str, str]  # name in the half -> name in the model
    buffer_names: dict[str, str]


class Halves(NamedTuple):
    """Both halves; shapes are without the batch dimension."""

    client: Half
    server: Half
    activation_shape: tuple[int, ...]
    classes: int


class Boundary(NamedTuple):
    """The place after a module; `names` are all modules that end there, the shortest first."""

    names: list[str]
    node: fx.Node | None  # the tensor that the modules give; None when it is not one
    client: list[fx.Node]  # what each half computes, in order
    server: list[fx.Node]
    fault: str  # why it is no legal cut; empty when it is

    @property
    def name(self) -> str:
        """The shortest name."""
        return self.names[0]


def cut_model(model: BuiltModel, cut: str) -> Halves:
    """Trace a model and cut it after the module `cut`. Raises ModelError, CutError."""
    return cut_traced(trace(model), cut)


def cut_traced(traced: Traced, cut: str) -> Halves:
    """Cut after the module `cut`. Raises CutError with the reason and the nearest legal cuts."""
    places = boundaries(traced)
    place = next((place for place in places if cut in place.names), None)
    if place is None or place.fault:
        why = place.fault if place is not None else _absent(traced, cut)
        raise CutError(
            f"model {traced.model.name}: cannot be cut after {cut!r}: {why}; "
            f"{_nearest(places, place)}"
        )
    assert place.node is not None
    shape = place.node.meta["val"].shape
    return Halves(
        build_half(traced, place.client, traced.inputs, place.node),
        build_half(traced, place.server, [place.node], traced.output),
        tuple(shape[1:]), int(traced.output.meta["val"].shape[1]),
    )  # fmt: skip


def legal_cuts(model: BuiltModel) -> list[str]:
    """The shortest name of each legal cut, in the order of execution."""
    return [place.name for place in boundaries(trace(model)) if not place.fault]


def boundaries(traced: Traced) -> list[Boundary]:
    """All places after a module, in the order of execution."""
    inside: dict[str, list[fx.Node]] = {}
    for node in traced.nodes:
        for name in module_stack(node):
            inside.setdefault(name, []).append(node)
    order = {node: position for position, node in enumerate(traced.nodes)}
    ends: dict[fx.Node, list[str]] = {}
    several: list[tuple[int, Boundary]] = []
    for name, nodes in inside.items():
        given = _given(traced, nodes)
        if len(given) == 1:
            ends.setdefault(given[0], []).append(name)
        elif given:
            fault = f"it gives {len(given)} tensors to what follows"
            several.append((order[given[-1]], Boundary([name], None, [], [], fault)))
    label = {node: min(names, key=_length) for node, names in ends.items()}
    places = [
        (order[node], _boundary(traced, node, sorted(names, key=_length), label))
        for node, names in ends.items()
    ]
    return [place for _, place in sorted(several + places, key=operator.itemgetter(0))]


def build_half(traced: Traced, nodes: list[fx.Node], given: list[fx.Node], result: fx.Node) -> Half:
    """A module that computes `result` from `given`; its state is named p0, p1, .. and b0, b1, .."""
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in given}
    source = values[given[0]]
    half = _with_state(traced, nodes)
    held = {
        name: graph.get_attr(own)
        for own, name in (half.parameter_names | half.buffer_names).items()
    }
    values |= {node: held[traced.state[node]] for node in nodes if node in traced.state}
    batch = graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
    device = graph.call_function(getattr, (source, "device"))

    def value(node: fx.Node) -> fx.Node:
        if node not in values:
            values[node] = _size(traced, node, batch, value)
        return values[node]

    for node in nodes:
        if node not in values and not is_size(node):
            copied = graph.node_copy(node, value)
            copied.meta = {}
            if "device" in copied.kwargs:  # constants are made where the input is
                copied.kwargs = {**copied.kwargs, "device": device}
            # A view that fits the strides of one device's kernels may not fit another's.
            if copied.target is torch.ops.aten.view.default:
                copied.target = torch.ops.aten.reshape.default
            values[node] = copied
    graph.output(values[result])
    graph.eliminate_dead_code()
    return half._replace(module=fx.GraphModule(half.module, graph).eval())


def _size(
    traced: Traced, node: fx.Node, batch: fx.Node, value: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """A size in a half, from the batch size of what the half is given."""
    size = node.meta["val"]
    if isinstance(size, torch.SymInt):
        factor = size.node.expr / traced.batch
        if factor.is_Integer:
            times = int(factor)
            return batch.graph.call_function(operator.mul, (batch, times)) if times > 1 else batch
    if not is_size(node) or any(not is_size(n) for n in node.all_input_nodes):
        raise ModelError(
            f"model {traced.model.name}: a size in {where(node)} is no multiple of the batch"
        )
    copied = batch.graph.node_copy(node, value)
    copied.meta = {}
    return copied


def _with_state(traced: Traced, nodes: list[fx.Node]) -> Half:
    """A module with the state that `nodes` read, in the model's order, and its names."""
    used = {traced.state[node] for node in nodes if node in traced.state}
    root = nn.Module()
    parameters = {f"p{i}": n for i, n in enumerate(n for n in traced.parameters if n in used)}
    buffers = {f"b{i}": n for i, n in enumerate(n for n in traced.buffers if n in used)}
    for own, name in parameters.items():
        root.register_parameter(own, traced.parameters[name])
    for own, name in buffers.items():
        root.register_buffer(own, traced.buffers[name])
    return Half(root, parameters, buffers)


def _given(traced: Traced, nodes: list[fx.Node]) -> list[fx.Node]:
    """What the operations of a module give to what follows it."""
    within = set(nodes)
    live = set(traced.nodes)
    return [
        node
        for node in nodes
        if node in traced.dependent
        and (node is traced.output or any(u not in within for u in node.users if u in live))
    ]


def _boundary(
    traced: Traced, node: fx.Node, names: list[str], label: dict[fx.Node, str]
) -> Boundary:
    before = ancestors([node])
    after, crossing, needed = _after(traced, node, before)
    client = [n for n in traced.nodes if n in before]
    server = [n for n in traced.nodes if n in after]
    fault = _fault(traced, node, client, server)
    if not fault and needed:
        fault = f"several tensors cross: the model's input {_listed(n.name for n in needed)} too"
    if not fault and crossing:
        others = _listed(label.get(n, f"an operation of {where(n)}") for n in crossing)
        fault = f"several tensors cross: the output of {others} too"
    return Boundary(names, node, client, server, fault)


def _after(
    traced: Traced, cut: fx.Node, before: set[fx.Node]
) -> tuple[set[fx.Node], list[fx.Node], list[fx.Node]]:
    """What the output needs after the cut; and what it needs from before, the cut apart."""
    seen: set[fx.Node] = set()
    crossing: list[fx.Node] = []
    needed: list[fx.Node] = []
    stack = [traced.output]
    while stack:
        node = stack.pop()
        if node in seen or node is cut or is_size(node):
            continue
        seen.add(node)
        if node in traced.inputs:
            needed.append(node)
        elif node in before and node in traced.dependent:
            crossing.append(node)
        else:
            stack += node.all_input_nodes
    return seen, crossing, needed


def _fault(traced: Traced, node: fx.Node, client: list[fx.Node], server: list[fx.Node]) -> str:
    halves = [{traced.state[n] for n in half if n in traced.state} for half in (client, server)]
    trained = [[name for name in traced.parameters if name in half] for half in halves]
    if not all(trained):
        return f"it leaves the {'server' if trained[0] else 'client'} half without parameters"
    shared = [name for name in trained[0] if name in trained[1]]
    if shared:
        return f"both sides share weights, which the halves would train apart: {_listed(shared)}"
    return _carried_fault(traced, node.meta["val"])


def _carried_fault(traced: Traced, value: Any) -> str:
    """Why no frame carries what crosses."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return f"what crosses is {getattr(value, 'dtype', 'not one tensor')}, not float32"
    shape = "x".join(str(n) if type(n) is int else "batch" for n in value.shape)
    if not value.ndim or not is_batch(traced, value.shape[0]):
        return f"what crosses has shape {shape or '()'}: the batch is not its first dimension"
    if any(type(size) is not int for size in value.shape[1:]):
        return f"what crosses has shape {shape}: the batch is in several dimensions"
    # A frame of differences adds the direction to the activation's dimensions.
    if value.ndim + 1 > MAX_DIMS:
        return f"what crosses has {value.ndim} dimensions, a frame carries {MAX_DIMS - 1}"
    return ""


def _absent(traced: Traced, cut: str) -> str:
    known = {name for name, _ in traced.model.module.named_modules(remove_duplicate=False)}
    if cut and cut.partition("@")[0] in known:
        return "that module computes nothing there that the input reaches and the output needs"
    return "the model has no module of that name"


def _nearest(places: list[Boundary], place: Boundary | None) -> str:
    legal = [p.name for p in places if not p.fault]
    if not legal:
        return "this model has no legal cut: --list-cuts gives the reasons"
    if place is None:
        shown = ", ".join(legal[:_MANY]) + (", .. (--list-cuts)" if len(legal) > _MANY else "")
        return f"legal cuts: {shown}"
    at = places.index(place)
    before = [p.name for p in places[:at] if not p.fault][-1:]
    after = [p.name for p in places[at:] if not p.fault][:1]
    sides = [f"{n} (before it)" for n in before] + [f"{n} (after it)" for n in after]
    return f"nearest legal cuts: {', '.join(sides)}"


def _length(name: str) -> tuple[int, int]:
    return name.count("."), len(name)


def _listed(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")
