"""What the server's steps cost beside their bare forward passes, and what batching them brings.

A step of K_s directions is 2 K_s forwards plus the directions: drawn once, added to the weights
twice for the two sides and once for the update. The bare forwards are those of the same half with
constant weights on the same batch, in inference mode. Both are timed in turns in one process, on
one thread; a ratio is the median over the repetitions' own ratios.

    .venv/bin/python benchmarks/server_steps.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from server_node.config import ServerSection
from server_node.half import ServerHalf, Turn
from server_node.machine import fix_arithmetic

BATCH: Final = 32
TAU: Final = 4
REPETITIONS: Final = 7
REPLICAS: Final = 4
LIMIT: Final = 1.15


class Row(NamedTuple):
    """A figure: `raw` holds the seconds of every repetition, `note` why there is no ratio."""

    name: str
    ratio: float | None
    limit: float | None
    raw: dict[str, list[float]]
    note: str = ""


class Case(NamedTuple):
    """A server half and the shape of one activation that it takes."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _alexnet() -> nn.Module:
    """The AlexNet for 3x32x32 of GAS (AAAI 2025), 3,868,746 parameters, after its first block."""
    return nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1), nn.MaxPool2d(3, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(2304, 1024), nn.Linear(1024, 512), nn.Linear(512, 10),
    )  # fmt: skip


def _mlp() -> nn.Module:
    """The mlp:196-32-32-10 after fc1."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


CASES: Final = (Case("AlexNet", _alexnet, (32, 16, 16)), Case("MLP", _mlp, (32,)))


def measure(repetitions: int = REPETITIONS) -> list[Row]:
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

    raw = _in_turns({"steps_s": steps, "forwards_s": forwards}, repetitions)
    ratios = [a / b for a, b in zip(raw["steps_s"], raw["forwards_s"], strict=True)]
    name = f"{TAU} server steps over their {2 * directions * TAU} forwards, {case.name} half"
    return Row(f"{name}, K_s = {directions}", statistics.median(ratios), LIMIT, raw)


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
    seconds = _in_turns(works, repetitions)
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


def _in_turns(works: dict[Any, Callable[[], None]], repetitions: int) -> dict[Any, list[float]]:
    """Seconds of every piece of work in every repetition; the first round only warms up."""
    seconds: dict[Any, list[float]] = {key: [] for key in works}
    for repetition in range(repetitions + 1):
        for key, work in works.items():
            begin_s = time.perf_counter()
            work()
            if repetition:
                seconds[key].append(time.perf_counter() - begin_s)
    return seconds


def main() -> None:
    """Print the rows."""
    for row in measure():
        limit = f" (limit {row.limit})" if row.limit else ""
        ratio = "not measured" if row.ratio is None else f"{row.ratio:.3f}"
        note = f"  {row.note}" if row.note else ""
        print(f"{row.name}: {ratio}{limit}{note}")


if __name__ == "__main__":
    main()
