"""What the server's steps cost beside their bare forward passes, and what batching them brings.

A step of K_s directions is 2 K_s forwards plus the directions: drawn once, added to the weights
twice for the two sides and once for the update. The bare forwards are those of the same half with
constant weights on the same batch, in inference mode. Both are timed in turns in one process, on
one thread; a ratio is the median over the repetitions' own ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.rows import Row, in_turns, ratio_row
from export.cuts import cut_model
from export.models import build_model
from server_node.half import ServerHalf
from server_node.machine import fix_arithmetic
from server_node.sections import ServerSection
from server_node.torch_half import Turn

BATCH: Final = 32
ALEXNET_CUT: Final = "conv1"
TAU: Final = 4
REPLICAS: Final = 4
LIMIT: Final = 1.15


class Case(NamedTuple):
    """A server half and the shape of one activation that it takes."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _alexnet() -> nn.Module:
    """The zoo's AlexNet after its first block."""
    return cut_model(build_model("alexnet", 0), ALEXNET_CUT).server.module


def _mlp() -> nn.Module:
    """The mlp:196-32-32-10 after fc1."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


CASES: Final = (Case("AlexNet", _alexnet, (32, 16, 16)), Case("MLP", _mlp, (32,)))


def measure(repetitions: int) -> list[Row]:
    """All rows: steps over bare forwards, then the time of a step by replicas and device."""
    threads = torch.get_num_threads()
    rows: list[Row] = []
    try:
        fix_arithmetic(ServerSection())
        rows += [_over_forwards(CASES[0], k, repetitions) for k in (1, 2)]
        for case in CASES:
            rows += _throughput(case, repetitions)
    finally:
        torch.set_num_threads(threads)
    return rows


def _over_forwards(case: Case, directions: int, repetitions: int) -> Row:
    steps = _steps(case, directions, 1, torch.device("cpu"))
    module = _seeded(case)
    h = torch.from_numpy(_activations(case, 1)[0])

    @torch.inference_mode()
    def forwards() -> None:
        for _ in range(2 * directions * TAU):
            module(h)

    raw = in_turns({"steps_s": steps, "forwards_s": forwards}, repetitions)
    name = f"{TAU} server steps over their {2 * directions * TAU} forwards, {case.name} half"
    return ratio_row(f"{name}, K_s = {directions}", LIMIT, raw["steps_s"], raw["forwards_s"], raw)


def _throughput(case: Case, repetitions: int) -> list[Row]:
    """A device's tau steps one by one on the CPU, over the same in batches and on CUDA."""
    cuda = torch.cuda.is_available()
    if cuda:
        fix_arithmetic(ServerSection(device="cuda"))
    works = {
        (kind, replicas): _steps(case, 1, replicas, torch.device(kind))
        for kind in (("cpu", "cuda") if cuda else ("cpu",))
        for replicas in (1, REPLICAS)
    }
    seconds = in_turns(works, repetitions)
    base = statistics.median(seconds["cpu", 1])
    rows = []
    for (kind, replicas), raw in seconds.items():
        ratio = replicas * base / statistics.median(raw)
        name = f"server steps a second, {case.name} half, {kind}, replicas = {replicas}"
        per_s = replicas * TAU / statistics.median(raw)
        rows.append(Row(f"{name}, over the cpu's", ratio, None, {"seconds": raw}, f"{per_s:.1f}/s"))
    if not cuda:
        name = f"server steps a second, {case.name} half, cuda, over the cpu's"
        rows.append(Row(name, None, None, {}, "torch finds no CUDA device"))
    return rows


def _steps(
    case: Case, directions: int, replicas: int, device: torch.device
) -> Callable[[], None]:  # fmt: skip
    """A round's tau steps of as many devices as there are replicas, from their activations on."""
    module = _seeded(case)
    weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy()
    half = ServerHalf(
        module, weights, run_seed=0, lam=1e-3, directions=directions, device=device,
        replicas=replicas,
    )  # fmt: skip
    labels = np.arange(BATCH, dtype=np.uint32) % 10
    batches = [half.place(h, labels) for h in _activations(case, replicas)]

    def steps() -> None:
        half.start_round(0, eta=1e-6)
        turns = [Turn(slot, slot, batch, []) for slot, batch in enumerate(batches)]
        for _ in range(TAU):
            for turn, scalars in zip(turns, half.steps(turns), strict=True):
                turn.done.append(scalars)

    return steps


def _seeded(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.build().eval()


def _activations(case: Case, count: int) -> list[NDArray[np.float32]]:
    values = np.random.default_rng(0)
    return [
        values.standard_normal((BATCH, *case.shape)).astype(np.float32) for _ in range(count)
    ]  # fmt: skip
