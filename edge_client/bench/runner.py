"""Takes the windows of a bench and keeps them as evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Final

from edge_client.bench.conditions import Conditions, busy_s, read_conditions
from edge_client.bench.evidence import Evidence
from edge_client.bench.orders import Done, Order, Task
from edge_client.bench.process import MeasuredProcess, Tick
from edge_client.bench.records import (
    MIN_ITERATIONS,
    REPORTABLE_WINDOW_S,
    Configuration,
    Cut,
    Latencies,
    Place,
    Window,
    window_target_s,
)
from edge_client.bundle import Bundle, read_bundle
from edge_client.errors import EvidenceError
from edge_client.power.integrate import Trace
from edge_client.power.meter import Meter
from edge_client.power.sampler import Sampler

# Before the first window of a process: caches, the clock governor, the runtime's arrangements.
_WARM_UP_S: Final = 5.0
# So many readings before and after a window: its edges are interpolated.
_MARGIN_READINGS: Final = 3

Notify = Callable[[float, str], None]  # planned seconds that are done, and what is being done


def describe(bundle: Bundle) -> Cut:
    """What configuration.toml says of a bundle."""
    manifest = bundle.manifest
    return Cut(
        bundle.digest, manifest.graph.sha256, str(bundle.folder.resolve()), manifest.model,
        manifest.cut, manifest.parameters, manifest.weights.size_bytes,
        list(manifest.activation.shape),
    )  # fmt: skip


def planned_s(configuration: Configuration, missing: Iterable[Place]) -> float:
    """How long these windows take, if no iteration is slow."""
    listed = list(missing)
    processes = len({place.cut for place in listed})
    return processes * _warm_up_s(configuration) + len(listed) * window_target_s(configuration)


def run_bench(
    evidence: Evidence, meter: Meter | None, notify: Notify, root: Path = Path("/")
) -> None:
    """Take all windows that are missing. Ctrl-C loses the open window only.

    `root` is where the machine's conditions are read. Raises BenchError, BundleError,
    EvidenceError.
    """
    done_s = 0.0
    configuration = evidence.configuration
    target_s, warm_up_s = window_target_s(configuration), _warm_up_s(configuration)
    for number, group in groupby(evidence.missing(), lambda place: place.cut):
        cut = configuration.cuts[number]
        label = f"{cut.model} cut at {cut.cut}"
        _check_bundle(cut, evidence.folder)
        notify(done_s, f"{label}: loading")
        with MeasuredProcess(_task(configuration, cut), label) as child:
            notify(done_s, f"{label}: warm-up")
            for kind in ("forward", "step"):
                child.take(Order(kind, warm_up_s / 2, 1, edge=False), lambda _: None)
            done_s += warm_up_s
            for place in group:
                what = f"{label}: {place.kind} {place.repeat + 1}"
                begin_s = done_s

                def tick(elapsed_s: float, begin_s: float = begin_s, what: str = what) -> None:
                    notify(begin_s + min(elapsed_s, target_s), what)

                tick(0.0)
                _take(evidence, place, child, meter, tick, root)
                done_s += target_s
    notify(done_s, "done")


def _take(
    evidence: Evidence, place: Place, child: MeasuredProcess, meter: Meter | None, tick: Tick,
    root: Path,
) -> None:  # fmt: skip
    configuration = evidence.configuration
    order = Order(
        place.kind, window_target_s(configuration),
        0 if place.kind == "idle" else _iterations(configuration),
        edge=place.kind != "idle",
    )  # fmt: skip
    before, other_s = read_conditions(root), -busy_s()
    trace: Trace | None = None
    if meter is None:
        done = child.take(order, tick)
    else:
        margin_s = _MARGIN_READINGS / configuration.rate_hz
        sampler = Sampler(meter, configuration.rate_hz)
        with sampler:
            time.sleep(margin_s)
            done = child.take(order, tick)
            time.sleep(margin_s)
        trace = sampler.trace()
    other_s = max(0.0, other_s + busy_s() - done.cpu_s)
    after = read_conditions(root)
    evidence.add(
        place, _window(done, other_s, before, after, trace), _latencies(done),
        None if trace is None else (trace.times_s.tolist(), trace.powers_w.tolist()),
    )  # fmt: skip


def _window(
    done: Done, other_s: float, before: Conditions, after: Conditions, trace: Trace | None
) -> Window:
    return Window(
        done.begin_s, done.end_s, done.iterations, done.cpu_s, other_s, done.rss_bytes,
        done.peak_rss_bytes, done.frame_bytes, before.temperature_c, after.temperature_c,
        before.frequency_hz, after.frequency_hz, before.throttle, after.throttle,
        trace.reason or None if trace is not None else None,
    )  # fmt: skip


def _latencies(done: Done) -> Latencies:
    columns = [list(column) for column in zip(*done.rows, strict=True)] or [[] for _ in range(5)]
    return Latencies([int(x) for x in columns[0]], *columns[1:])


def _task(configuration: Configuration, cut: Cut) -> Task:
    return Task(
        cut.folder, configuration.batch, configuration.directions, configuration.lam,
        configuration.encoding, configuration.threads, configuration.gpio,
    )  # fmt: skip


def _check_bundle(cut: Cut, folder: Path) -> None:
    """A resumed bench may find another bundle where one lay."""
    if read_bundle(Path(cut.folder)).digest != cut.bundle:
        raise EvidenceError(
            f"{cut.folder}: not the bundle that {folder} was begun with; copy that one there again"
        )


def _warm_up_s(configuration: Configuration) -> float:
    return min(_WARM_UP_S, configuration.window_s)


def _iterations(configuration: Configuration) -> int:
    return MIN_ITERATIONS if configuration.window_s >= REPORTABLE_WINDOW_S else 1
