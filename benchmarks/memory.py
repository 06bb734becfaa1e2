"""Peak resident memory of real device processes, beside their parts and a first-order device's.

A run of two rounds with a broker, a server and `musplit device`, whose VmHWM (proc(5)) is read
until it ends: fetch, start, rounds, replay and the last save are all in it. Parts of the sum:

imports      peak of a process that imports what the device program does
weights      weights.bin
scratch      the perturbed copy of the weights, and 256 KiB of directions
activations  1 + K frames kept until the commit, the input, h+, h- and their difference, and what
             a plain ONNX Runtime forward holds inside (plain_forward.py, a process of its own)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np

from benchmarks.halves import ALEXNET, LENET, MODELS, TRANSFORMER, WIDE, Case, constant_graph
from benchmarks.rows import Row, ratio_row
from edge_client.bundle import read_bundle
from export.exporter import export_model

ROOT: Final = Path(__file__).resolve().parent.parent
DIRECTIONS: Final = 4
ROUNDS: Final = 2
ALLOWANCE_BYTES: Final = 24 * 10**6
# A half as large as this is held to the sum times 1.25 too.
LARGE_BYTES: Final = 64 * 10**6
# Real processes start anew in every repetition.
_MOST_REPETITIONS: Final = 5
_POLL_S: Final = 0.005
_PATIENCE_S: Final = 180.0
_IMPORTS: Final = (
    "import edge_client.program, musplit.cli; from edge_client.memory import memory_bytes; "
    "print(memory_bytes()[1])"
)


class Parts(NamedTuple):
    """What a device process cannot do without, in bytes; see the module's docstring."""

    weights: int
    scratch: int
    activations: int


def measure(repetitions: int) -> list[Row]:
    """Rows of all halves: within the parts, within 1.25 of them, beside first order."""
    rows: list[Row] = []
    for label, case in (
        ("LeNet", LENET), ("AlexNet, all convolutions", ALEXNET),
        ("transformer block", TRANSFORMER), ("linear, 67 MB", WIDE),
    ):  # fmt: skip
        rows += _rows(label, case, min(repetitions, _MOST_REPETITIONS))
    return rows


def _rows(label: str, case: Case, repetitions: int) -> list[Row]:
    parts = _parts(case)
    raw: dict[str, list[float]] = {}
    for _ in range(repetitions):
        first = _first_order(case)
        found = {
            "imports_bytes": _imports_bytes(),
            "device_peak_bytes": _device_peak_bytes(case),
            "first_order_imports_bytes": first["imports_bytes"],
            "first_order_peak_bytes": first["peak_bytes"],
            "autograd_saved_bytes": first["saved_bytes"],
        }
        for name, value in found.items():
            raw.setdefault(name, []).append(float(value))
    peak, imports = raw["device_peak_bytes"], raw["imports_bytes"]
    sums = [value + sum(parts) for value in imports]
    note = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in parts._asdict().items())
    note = f"MB: peak {_mb(peak)}, imports {_mb(imports)}, {note}"
    rows = [
        ratio_row(
            f"device's peak memory over its parts + 24 MB, {label}", 1.0,
            peak, [s + ALLOWANCE_BYTES for s in sums], raw, note,
        )
    ]  # fmt: skip
    if parts.weights >= LARGE_BYTES:
        rows.append(
            ratio_row(f"device's peak memory over its parts, {label}", 1.25, peak, sums, raw, note)
        )
    return rows + _beside_first_order(label, raw)


def _beside_first_order(label: str, raw: dict[str, list[float]]) -> list[Row]:
    peak, other = raw["device_peak_bytes"], raw["first_order_peak_bytes"]
    above = [a - b for a, b in zip(peak, raw["imports_bytes"], strict=True)]
    other_above = [a - b for a, b in zip(other, raw["first_order_imports_bytes"], strict=True)]
    return [
        ratio_row(
            f"device's peak memory over a first-order torch device's, {label}", None, peak, other,
            raw, f"MB: {_mb(peak)} and {_mb(other)}",
        ),
        ratio_row(
            f"the same above the imports, {label}", None, above, other_above, raw,
            f"MB: {_mb(above)} and {_mb(other_above)}; autograd saves "
            f"{_mb(raw['autograd_saved_bytes'])}, a forward-only client none of it",
        ),
    ]  # fmt: skip


def _parts(case: Case) -> Parts:
    with tempfile.TemporaryDirectory(prefix="musplit-bench-") as name:
        folder = Path(name)
        exported = export_model(
            f"{MODELS}:{case.factory}", "0", folder, seed=0, input_shape=case.shape
        )
        bundle = read_bundle(exported.client)
        graph = folder / "constant.onnx"
        graph.write_bytes(constant_graph(bundle))
        inside = int(_module("plain_forward", str(graph), str(case.batch), _commas(case)))
    weights = bundle.manifest.weights.size_bytes
    activation = 4 * case.batch * math.prod(bundle.manifest.activation.shape)
    buffers = 4 * case.batch * math.prod(case.shape) + 3 * activation
    frames = (1 + DIRECTIONS) * activation
    return Parts(weights, weights + (256 << 10), frames + buffers + inside)


# -- processes


def _device_peak_bytes(case: Case) -> int:
    """One real run; the device process's VmHWM."""
    with tempfile.TemporaryDirectory(prefix="musplit-bench-") as name, _Processes() as started:
        folder = Path(name)
        _write_data(case, folder)
        _call("shard", str(folder / "data.npz"), "--devices", "1", "--out", str(folder / "shards"))
        address = f"127.0.0.1:{_free_port()}"
        started.start("broker", "--listen", address)
        _wait_for_port(address)
        settings = {
            "run.rounds": ROUNDS, "model.name": f"{MODELS}:{case.factory}", "model.cut": "0",
            "model.input_shape": list(case.shape), "data.source": str(folder / "data.npz"),
            "data.standardise": "global", "method.eta_c": 1e-6, "method.eta_s": 1e-6,
            "devices.count": 1, "devices.batch": case.batch,
            "method.tau": 1, "method.directions_client": DIRECTIONS, "evaluation.every": ROUNDS,
            "evaluation.control": False,
        }  # fmt: skip
        overrides = [part for k, v in settings.items() for part in ("--set", f"{k}={_toml(v)}")]
        digits = str(ROOT / "experiments" / "digits.toml")
        serve = started.start(
            "serve", digits, "--broker", address, "--out", str(folder / "run"), *overrides
        )
        device = started.start(
            "device", "--id", "measured", "--broker", address, "--state", str(folder / "state"),
            "--data", str(folder / "shards" / "shard-000.npz"),
        )  # fmt: skip
        peak_bytes = _watch(device)
        if serve.wait(_PATIENCE_S) != 0 or device.returncode != 0:
            started.log.seek(0)
            said = started.log.read().decode(errors="replace")
            raise RuntimeError(f"the run of {case.factory} failed:\n{said}")
    return peak_bytes


def _watch(process: subprocess.Popen[bytes]) -> int:
    """VmHWM of a process until it ends; it only grows, so the last look is the peak."""
    peak_kb = 0
    deadline_s = time.monotonic() + _PATIENCE_S
    while process.poll() is None:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            fields = dict(line.split(":", 1) for line in status.splitlines())
            peak_kb = max(peak_kb, int(fields.get("VmHWM", "0 kB").split()[0]))
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the device did not end within {_PATIENCE_S:.0f} s")
        time.sleep(_POLL_S)
    return peak_kb * 1024


class _Processes:
    """The commands of one run; those that still live are ended with it."""

    def __init__(self) -> None:
        self._alive: list[subprocess.Popen[bytes]] = []
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the processes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._alive):
            process.terminate()
        for process in self._alive:
            process.wait(10.0)
        self.log.close()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `musplit ARGUMENTS`; what it says goes to `log`."""
        process = subprocess.Popen(
            [sys.executable, "-m", "musplit", *arguments], env=_environment(), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=self.log,
        )  # fmt: skip
        self._alive.append(process)
        return process


def _call(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "musplit", *arguments], env=_environment(), check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def _imports_bytes() -> int:
    return int(_output(sys.executable, "-c", _IMPORTS))


def _first_order(case: Case) -> Mapping[str, int]:
    found: dict[str, int] = json.loads(
        _module("first_order", case.factory, str(case.batch), "3", _commas(case))
    )
    return found


def _commas(case: Case) -> str:
    return ",".join(map(str, case.shape))


def _module(name: str, *arguments: str) -> str:
    return _output(sys.executable, "-m", f"benchmarks.{name}", *arguments)


def _output(*command: str) -> str:
    child = subprocess.run(
        command, env=_environment(), check=True, capture_output=True, text=True, cwd=ROOT
    )
    return child.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _write_data(case: Case, folder: Path) -> None:
    """Two batches of noise: the shard itself counts for little."""
    random = np.random.default_rng(0)
    count = 2 * case.batch
    x = random.integers(0, 256, (count, *case.shape), np.uint8)
    y = np.arange(count) % 10
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])


def _toml(value: Any) -> str:
    return json.dumps(value)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_for_port(address: str) -> None:
    host, port = address.split(":")
    deadline_s = time.monotonic() + 30.0
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1.0):
            return
        time.sleep(0.05)
    raise RuntimeError(f"no broker at {address}")


def _mb(values: list[float]) -> str:
    return f"{statistics.median(values) / 1e6:.1f}"
