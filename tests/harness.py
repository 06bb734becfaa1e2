"""Fault harness: the real commands as child processes, and a proxy that counts, holds and cuts.

Every process carries a marker of its bench in its environment, so that whatever a test leaves
behind is found and ended, and nothing else is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import psutil
from click.testing import CliRunner, Result

from emulation.inprocess import InProcessFleet
from musplit.cli import main
from server_node.config import DataSection, load_config
from server_node.datasets import load_dataset
from server_node.partition import write_shards
from server_node.prepare import prepare
from wire_protocol.manifest import sha256
from wire_protocol.mqtt import Address

ROOT: Final = Path(__file__).resolve().parents[1]
DIGITS: Final = ROOT / "experiments" / "digits.toml"
LOOPBACK: Final = "127.0.0.1"
_MARKER: Final = "MUSPLIT_TEST_BENCH"

Overrides = Mapping[str, object]

# Seconds of training, on two devices.
TINY: Final[Overrides] = {
    "run.rounds": 6, "devices.count": 2, "devices.batch": 8, "method.tau": 2,
    "method.directions_client": 4, "evaluation.every": 3, "evaluation.control": False,
}  # fmt: skip


class Digests(NamedTuple):
    """SHA-256 of both halves' weights at the end of a run."""

    client: str
    server: str

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Digests:
        """Those of a summary, or of `replay --format json`."""
        if "client_sha256" in summary:
            return cls(summary["client_sha256"], summary["server_sha256"])
        return cls(summary["client_weights_sha256"], summary["server_weights_sha256"])


# -- waiting and reading


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
    """The first true value of `condition`; fails the test after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.03)
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; none while it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def wait_for_round(run: Path, number: int, timeout_s: float = 120.0) -> None:
    """Return once the server has recorded round `number` of the run folder `run`."""
    what = f"round {number} of {run.name}"
    wait_until(lambda: len(read_jsonl(run / "rounds.jsonl")) > number, what, timeout_s)


def flags(overrides: Overrides) -> list[str]:
    """The overrides as --set options."""
    return [part for pair in _pairs(overrides) for part in ("--set", pair)]


def _pairs(overrides: Overrides) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def make_shards(folder: Path, count: int = 2) -> list[Path]:
    """The shards of digits that a run with seed 0 uses."""
    return write_shards(load_dataset(DataSection()), count, 0.0, 0, folder)


def undisturbed(overrides: Overrides) -> Digests:
    """The digests of the same run in this process: no network, no faults, no waiting."""
    return _in_process(tuple(p for p in _pairs(overrides) if not p.startswith("server.min_step_s")))


@functools.cache
def _in_process(pairs: tuple[str, ...]) -> Digests:
    with tempfile.TemporaryDirectory(prefix="musplit-test-") as folder:
        run = InProcessFleet(prepare(load_config(DIGITS, list(pairs)), Path(folder))).run()
    return Digests(sha256(run.client), sha256(run.server))


def here(*arguments: str, cwd: Path | None = None) -> Result:
    """`musplit ARGUMENTS` in this process: for what ends before it starts anything, in no time."""
    with contextlib.chdir(cwd or Path.cwd()):
        return CliRunner().invoke(main, arguments)


# -- processes


class Child:
    """One started command, with its stdout and stderr in files."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], logs: Path) -> None:
        self.name, self.process = name, process
        self._out, self._err = logs / f"{name}.out", logs / f"{name}.err"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 120.0) -> None:
        """Return once `text` stands on stderr; fails when the process ends before."""

        def seen() -> bool:
            ended = self.process.poll() is not None
            found = text in self.stderr
            assert found or not ended, f"{self.name} ended before {text!r}:\n{self.stderr}"
            return found

        wait_until(seen, f"{text!r} from {self.name}", timeout_s)

    def finish(self, timeout_s: float = 120.0) -> int:
        """The exit code; fails when the process does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            text = f"{self.name} still runs after {timeout_s:.0f} s:\n{self.stderr[-4000:]}"
            raise AssertionError(text) from error

    def kill(self) -> None:
        """SIGKILL: no goodbye, no cleanup."""
        self.process.kill()
        self.process.wait()

    @property
    def code(self) -> int | None:
        """The exit code, once it has ended."""
        return self.process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)


class Bench:
    """Starts commands and proxies; everything ends with the `with` block, also on failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logs = folder / "bench-logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._mark = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._children: list[Child] = []
        self._proxies: list[Proxy] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._proxies:
            proxy.close()
        alive = [child.process for child in self._children if child.process.poll() is None]
        for process in alive:
            process.terminate()
        deadline_s = time.monotonic() + 8.0
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline_s - time.monotonic()))
        for survivor in self.survivors():
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        for child in self._children:
            child.process.wait()

    def start(
        self, *arguments: str, name: str = "", cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:  # fmt: skip
        """Start `musplit ARGUMENTS`."""
        name = f"{next(self._numbers):02d}-{name or arguments[0]}"
        folder = cwd or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        out, err = self._logs / f"{name}.out", self._logs / f"{name}.err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "musplit", *arguments], cwd=folder,
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
                env={**os.environ, **(env or {}), _MARKER: self._mark},
            )  # fmt: skip
        child = Child(name, process, self._logs)
        self._children.append(child)
        return child

    def run(
        self, *arguments: str, timeout_s: float = 120.0, cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:  # fmt: skip
        """Start a command and wait for its end."""
        child = self.start(*arguments, cwd=cwd, env=env)
        child.finish(timeout_s)
        return child

    def broker(self, *more: str) -> Address:
        """Start `musplit broker` and wait until it listens."""
        address = Address(LOOPBACK, free_port())
        self.start("broker", "--listen", str(address), *more).wait_for("listening on")
        return address

    def serve(self, address: Address, run: Path, overrides: Overrides, *more: str) -> Child:
        """Start `musplit serve` with the digits experiment."""
        return self.start(
            "serve", str(DIGITS), "--broker", str(address), "--out", str(run), *flags(overrides),
            *more,
        )  # fmt: skip

    def device(
        self, device_id: str, address: Address, shard: Path, *more: str,
        env: Mapping[str, str] | None = None,
    ) -> Child:  # fmt: skip
        """Start `musplit device` in a folder of its own, where it keeps its state."""
        return self.start(
            "device", "--id", device_id, "--broker", str(address), "--data", str(shard), *more,
            name=device_id, cwd=self.folder / f"board-{device_id}", env=env,
        )  # fmt: skip

    def state_folder(self, device_id: str) -> Path:
        """Where `device` keeps this device's state."""
        return self.folder / f"board-{device_id}" / "musplit-state" / device_id

    def proxy(self, upstream: Address) -> Proxy:
        """A proxy in front of `upstream`."""
        proxy = Proxy(upstream)
        self._proxies.append(proxy)
        return proxy

    def survivors(self) -> list[psutil.Process]:
        """Processes of this bench that run now, those started by its commands included."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def left_behind(self) -> list[str]:
        """The command lines of `survivors`, for a readable comparison with nothing."""
        lines: list[str] = []
        for process in self.survivors():
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return lines

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARKER) == self._mark
        except (psutil.Error, OSError):
            return False


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


# -- the proxy


class Proxy:
    """A TCP proxy: counts bytes both ways, holds the uplink, cuts connections."""

    def __init__(self, upstream: Address) -> None:
        self._upstream = upstream
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address = Address(LOOPBACK, int(self._listener.getsockname()[1]))
        self.bytes_up = self.bytes_down = self.connections = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._uplink_flows = threading.Event()
        self._uplink_flows.set()
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def hold_uplink(self) -> None:
        """Keep what clients send until `release_uplink`."""
        self._uplink_flows.clear()

    def release_uplink(self) -> None:
        """Let held bytes go on."""
        self._uplink_flows.set()

    def cut(self) -> int:
        """Cut all connections, in both directions at once; returns how many sockets that was."""
        with self._lock:
            for end in self._open:
                _shut(end)
            return len(self._open)

    def close(self) -> None:
        """Cut everything and stop listening."""
        self._closing = True
        _shut(self._listener)
        self._listener.close()
        self._uplink_flows.set()
        self._threads[0].join(5.0)
        self.cut()
        for thread in self._threads:
            thread.join(5.0)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection(self._upstream, timeout=5.0)
            except OSError:
                client.close()
                continue
            broker.settimeout(None)
            thread = threading.Thread(target=self._connect, args=(client, broker), daemon=True)
            with self._lock:
                self.connections += 1
                self._open |= {client, broker}
            self._threads.append(thread)
            thread.start()

    def _connect(self, client: socket.socket, broker: socket.socket) -> None:
        for end in (client, broker):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        down = threading.Thread(target=self._pump, args=(broker, client, False), daemon=True)
        down.start()
        self._pump(client, broker, True)
        down.join()
        with self._lock:
            self._open -= {client, broker}
        client.close()
        broker.close()

    def _seen(self, source: socket.socket, data: bytes) -> None:
        """What passes, for those who record it."""

    def _pump(self, source: socket.socket, target: socket.socket, uplink: bool) -> None:  # noqa: FBT001
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if uplink:
                    self._uplink_flows.wait()
                self._seen(source, data)
                target.sendall(data)
                with self._lock:
                    if uplink:
                        self.bytes_up += len(data)
                    else:
                        self.bytes_down += len(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
