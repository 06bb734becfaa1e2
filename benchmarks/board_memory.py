"""Resident memory of an idle device program, on this machine and under arm64 emulation.

`python -m benchmarks.board_memory` starts a broker and one device, waits until the device is
connected and quiet, and reads smaps_rollup (proc(5)): RSS, what is in memory, and PSS, with shared
pages divided among their users. No server is there, so the device does what a board does between
runs. An emulated figure holds the emulator and its translated code too: it bounds nothing on a
board, and is there to be seen.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from emulation.processes import Processes, processes
from scripts.arm64.cache import UnavailableError
from scripts.arm64.stage import boards_and_pin
from scripts.arm64.userland import CPUS, userland

LIMIT_MB: Final = 90.0  # RSS on this machine
_QUIET_S: Final = 3.0
_PATIENCE_S: Final = 240.0


class Memory(NamedTuple):
    """Of one process, in MB (1e6 bytes)."""

    rss_mb: float
    pss_mb: float
    peak_mb: float


def main() -> None:
    """Print a line per machine; exit code 1 when the one without emulation is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="under emulation too: minutes")
    parser.add_argument("--identity", type=Path, help="connect by TLS with this identity folder")
    parser.add_argument(
        "--broker", help="HOST:PORT of a broker that runs; otherwise one is started"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    asked = parser.parse_args()
    tls = [] if asked.identity is None else ["--identity", str(asked.identity.absolute())]
    here = idle_memory([sys.executable], asked.broker, tls)
    figures = {f"{sys.platform} {platform.machine()}": here}
    _show(next(iter(figures)), here, f"limit {LIMIT_MB:.0f} MB RSS")
    for cpu in CPUS if asked.emulated else ():
        try:
            with tempfile.TemporaryDirectory(prefix="musplit-bench-") as metadata:
                built = userland({"onnxruntime": boards_and_pin(cpu)[1]})
                variables = built.variables(Path(metadata))
                command = ["env", *(f"{k}={v}" for k, v in variables.items()), *built.python(cpu)]
                figures[cpu] = idle_memory(command, asked.broker, tls)
        except UnavailableError as error:
            print(f"{cpu:16} not measured: {error}")
            continue
        _show(cpu, figures[cpu], "emulator and translated code included")
    if asked.out is not None:
        asked.out.write_text(json.dumps(_plain(figures), indent=1) + "\n", encoding="utf-8")
    if here.rss_mb > LIMIT_MB:
        sys.exit(1)


def idle_memory(python: Sequence[str], broker: str | None, tls: Sequence[str]) -> Memory:
    """Memory of `PYTHON -m musplit device`, connected, without a server."""
    with tempfile.TemporaryDirectory(prefix="musplit-bench-") as name, processes() as group:
        folder = Path(name)
        x, y = np.zeros((16, 64), np.float32), np.arange(16) % 10
        np.savez(folder / "shard.npz", x=x, y=y, shard_index=np.int64(0))
        address = broker or _broker(group, folder)
        log = folder / "device.log"
        device = group.start(
            [*python, "-m", "musplit", "device", "--id", "idle", "--broker", address, *tls,
             "--data", str(folder / "shard.npz"), "--state", str(folder / "state"),
             "--connect-s", "120"],
            log,
        )  # fmt: skip
        _wait_until_connected(device, log)
        time.sleep(_QUIET_S)
        return _memory(device.pid)


def _broker(group: Processes, folder: Path) -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    group.start(
        [sys.executable, "-m", "musplit", "broker", "--listen", address], folder / "broker.log"
    )
    return address


def _wait_until_connected(device: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while "connected to" not in (said := log.read_text(errors="replace")):
        if device.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"the device did not connect:\n{said}")
        time.sleep(0.1)


def _memory(pid: int) -> Memory:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    kib = {line.split(":")[0]: line.split()[1] for line in (rollup + status).splitlines()
           if line.endswith(" kB")}  # fmt: skip
    rss, pss, peak = (int(kib[name]) * 1024 / 1e6 for name in ("Rss", "Pss", "VmHWM"))
    return Memory(rss, pss, peak)


def _show(name: str, memory: Memory, note: str) -> None:
    print(
        f"{name:16} RSS {memory.rss_mb:6.1f} MB, PSS {memory.pss_mb:6.1f} MB, peak "
        f"{memory.peak_mb:6.1f} MB ({note})", flush=True,
    )  # fmt: skip


def _plain(figures: Mapping[str, Memory]) -> dict[str, dict[str, float]]:
    return {name: memory._asdict() for name, memory in figures.items()}


if __name__ == "__main__":
    main()
