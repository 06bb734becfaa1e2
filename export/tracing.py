"""A model as a graph of ATen operations, with the module that each operation belongs to.

By torch.export, not strict: the model's Python code runs once, with an open batch size. What
stays in the graph are operations on values; what depends on the values themselves is refused.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from export.errors import ModelError, first_line
from export.inputs import example
from export.models import BuiltModel

_BATCH: Final = 2
# Operations that pass integers on as they are: an index may go through them to its table.
_PASSING: Final = (
    "view", "reshape", "flatten", "unsqueeze", "squeeze", "transpose", "permute", "slice",
    "select", "expand", "clone", "contiguous", "to", "_to_copy", "unflatten", "alias",
)  # fmt: skip
_STATE_KINDS: Final = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Traced(NamedTuple):
    """A model's graph: `nodes` are those that the output depends on, in the order of execution."""

    model: BuiltModel
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    output: fx.Node
    state: dict[fx.Node, str]  # parameters, buffers and constants, by the model's first name
    parameters: dict[str, torch.nn.Parameter]  # in the model's order; names are `state`'s
    buffers: dict[str, torch.Tensor]  # constants too
    dependent: set[fx.Node]  # tensors that the inputs' values reach
    batch: Any  # the symbol of the batch size


def trace(model: BuiltModel) -> Traced:
    """Trace a model in evaluation mode. Raises ModelError."""
    program = _export(model)
    signature = program.graph_signature
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    inputs: list[fx.Node] = []
    state: dict[fx.Node, str] = {}
    named = _first_names(model)
    constants: dict[str, torch.Tensor] = {}
    for spec in signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in _STATE_KINDS and spec.target is not None:
            state[node] = named.get(spec.target, spec.target)
            if spec.kind is InputKind.CONSTANT_TENSOR:
                constants[spec.target] = program.constants[spec.target]
        else:
            raise ModelError(f"model {model.name}: holds {spec.kind.name}, which no half can carry")
    output = _output(model, program)
    live = ancestors([output])
    nodes = [node for node in program.graph.nodes if node in live]
    traced = Traced(
        model, nodes, inputs, output, state,
        dict(model.module.named_parameters()), {**dict(model.module.named_buffers()), **constants},
        _dependent(nodes, inputs), _batch_symbol(model, inputs),
    )  # fmt: skip
    _check(traced)
    return traced


def ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """Everything these nodes depend on, themselves included."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def is_size(node: fx.Node) -> bool:
    """True for a number, such as a batch size, in place of a tensor."""
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def index_limits(traced: Traced) -> list[int | None]:
    """Per input, the size of the smallest table that it indexes; None without one. ModelError."""
    limits: list[int | None] = [None] * len(traced.inputs)
    for node in traced.nodes:
        for table, size, index in _lookups(node):
            source = _source(index)
            if source not in traced.inputs:
                continue
            position = traced.inputs.index(source)
            if traced.model.inputs[position].dtype != "int64":
                raise ModelError(
                    f"model {traced.model.name}: uses its input {source.name} as an index into "
                    f"{traced.state.get(table, table.name)}: give --input-shape int:N,.. for it "
                    "(in a run: --set 'model.input_shape=[\"int:N,..\"]')"
                )
            limits[position] = min(size, limits[position] or size)
    return limits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's tracer and exporter: they log, warn and print beside their errors."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """torch.nn's fused transformer layers are one operation that neither cuts nor exports."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _export(model: BuiltModel) -> torch.export.ExportedProgram:
    with torch.no_grad():
        given = model.module(*example(model.inputs, _BATCH))
    if not isinstance(given, torch.Tensor):
        raise ModelError(
            f"model {model.name}: gives a {type(given).__name__}; it must give one tensor, one row "
            "of class scores per sample"
        )
    open_batch = tuple({0: torch.export.Dim("batch")} for _ in model.inputs)
    try:
        with quiet(), plain_attention():
            program = torch.export.export(
                # A copy: tracing leaves its own tensors in some modules.
                copy.deepcopy(model.module), example(model.inputs, _BATCH),
                dynamic_shapes=open_batch, strict=False,
            )  # fmt: skip
            _check_operations(model, program.graph)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except ModelError:
        raise
    except Exception as error:  # the user's code and torch may raise anything
        raise ModelError(
            f"model {model.name}: cannot be traced by torch.export ({_cause(error)}); the path "
            "through the model and the sizes in it must not depend on values, nor on one batch size"
        ) from error
    return program


def _cause(error: Exception) -> str:
    lines = str(error).splitlines()
    told = [line.strip(" -") for line in lines if "specialized" in line]
    return told[0] if told else first_line(error)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _check_operations(model: BuiltModel, graph: fx.Graph) -> None:
    """Refuse what a frozen, repeatable forward pass cannot have."""
    for node in graph.nodes:
        name = _operation(node)
        if name in ("batch_norm", "dropout") and node.args[5 if name == "batch_norm" else 2]:
            what = "the statistics of each batch" if name == "batch_norm" else "random numbers"
            remedy = "track_running_stats=True" if name == "batch_norm" else "training=False"
            raise ModelError(
                f"model {model.name}: {where(node)} uses {what} in evaluation mode; a half must "
                f"compute each sample alone and alike: {remedy}"
            )
        tags = getattr(node.target, "tags", ())
        if name != "dropout" and torch.Tag.nondeterministic_seeded in tags and _is_drawn(node):
            raise ModelError(
                f"model {model.name}: {where(node)} draws random numbers ({name}) in evaluation "
                "mode; a half must compute a sample alike each time"
            )


def _is_drawn(node: fx.Node) -> bool:
    # Attention carries the tag for its dropout, which evaluation mode sets to 0.
    return _operation(node) not in ("scaled_dot_product_attention", "lstm", "gru", "rnn_tanh",
                                    "rnn_relu")  # fmt: skip


def where(node: fx.Node) -> str:
    """The module that an operation belongs to, in words."""
    stack = module_stack(node)
    return stack[-1] if stack else "the model's own forward"


def module_stack(node: fx.Node) -> list[str]:
    """Names of the modules around an operation, outermost first; NAME@n in the n-th call again."""
    names: list[str] = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        name = path.partition("@")[0]
        _, again, call = key.rpartition("@")
        if name and name != key:
            names.append(f"{name}@{call}" if again and call.isdecimal() else name)
    return names


def _operation(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", ""))


def _first_names(model: BuiltModel) -> dict[str, str]:
    """Every name of a parameter -> the first of its names."""
    first = {id(tensor): name for name, tensor in model.module.named_parameters()}
    every = model.module.named_parameters(remove_duplicate=False)
    names = {name: first[id(tensor)] for name, tensor in every}
    first = {id(tensor): name for name, tensor in model.module.named_buffers()}
    buffers = model.module.named_buffers(remove_duplicate=False)
    return names | {name: first[id(tensor)] for name, tensor in buffers}


def _output(model: BuiltModel, program: torch.export.ExportedProgram) -> fx.Node:
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    if OutputKind.BUFFER_MUTATION in kinds or OutputKind.PARAMETER_MUTATION in kinds:
        raise ModelError(
            f"model {model.name}: changes its own state in evaluation mode; a half must compute a "
            "sample alike each time"
        )
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    assert isinstance(outputs, (tuple, list))
    given = [o for o, k in zip(outputs, kinds, strict=True) if k is OutputKind.USER_OUTPUT]
    (output,) = given
    assert isinstance(output, fx.Node)
    return output


def _dependent(nodes: list[fx.Node], inputs: list[fx.Node]) -> set[fx.Node]:
    reached = set(inputs)
    for node in nodes:
        if not is_size(node) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _batch_symbol(model: BuiltModel, inputs: list[fx.Node]) -> Any:
    size = inputs[0].meta["val"].shape[0] if len(inputs) else None
    if not isinstance(size, torch.SymInt):
        raise ModelError(f"model {model.name}: takes one batch size only; leave it open")
    return size.node.expr


def _check(traced: Traced) -> None:
    name = traced.model.name
    for node in traced.nodes:
        symbols = getattr(getattr(node.meta.get("val"), "node", None), "expr", None)
        if is_size(node) and getattr(symbols, "free_symbols", set()) - {traced.batch}:
            raise ModelError(f"model {name}: a size in {where(node)} depends on values")
    shape = traced.output.meta["val"].shape
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        raise ModelError(f"model {name}: the last layer must give one number per class")
    if not is_batch(traced, shape[0]):
        raise ModelError(f"model {name}: must give one row of class scores per sample")
    for parameter, tensor in traced.parameters.items():
        if tensor.dtype != torch.float32:
            raise ModelError(
                f"model {name}: parameter {parameter} is {tensor.dtype}: parameters must be float32"
            )


def is_batch(traced: Traced, size: Any) -> bool:
    """True when a size is the batch size."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr == traced.batch)


def _lookups(node: fx.Node) -> Iterator[tuple[fx.Node, int, fx.Node]]:
    """Table, its size, and the index, of operations that look values up."""
    name, args = _operation(node), node.args
    if name == "embedding":
        pairs: list[tuple[int, Any]] = [(0, args[1])]
    elif name == "index_select" and isinstance(args[1], int):
        pairs = [(args[1], args[2])]
    elif name == "index" and isinstance(args[1], (list, tuple)):
        pairs = list(enumerate(args[1]))
    else:
        return
    table = args[0]
    assert isinstance(table, fx.Node)
    for axis, index in pairs:
        size = table.meta["val"].shape[axis]
        if isinstance(index, fx.Node) and isinstance(size, int):
            yield table, size, index


def _source(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and _operation(node) in _PASSING:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node
