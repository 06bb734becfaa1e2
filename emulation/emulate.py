"""`musplit emulate`: broker, server and devices as processes on this machine, watched and ended."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from emulation.broker import LOOPBACK, free_port, wait_for_broker
from emulation.errors import FleetError
from emulation.processes import Processes, last_line, musplit_command, processes
from server_node.config import Config, to_toml
from server_node.datasets import load_dataset
from server_node.partition import shard_name, write_shards
from wire_protocol.errors import RefusedError, TransportError
from wire_protocol.mqtt import Address

_BROKER_START_S: Final = 20.0
# A device that dies is started again, as a service manager would; this often at most.
_RESTARTS: Final = 5
_POLL_S: Final = 0.1
# Exit codes after which starting a device again cannot help.
_FINAL_CODES: Final = (2, 3, RefusedError.exit_code)

Notify = Callable[[dict[str, Any]], None]


@dataclass
class _Device:
    """One device process and how often it was started again."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes]
    restarts: int = 0


def emulate(config: Config, folder: Path, notify: Notify) -> dict[str, Any]:
    """Run the whole experiment; returns the summary. Everything started is stopped again.

    Raises FleetError when a process ends with an error, with that error's text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = folder / "logs"
    with processes() as group:
        address, broker = _start_broker(group, logs, config.emulation.max_packet_bytes)
        server = _start_server(group, config, folder, address)
        # The server exports its model meanwhile.
        data = load_dataset(config.data)
        count, alpha, seed = config.devices.count, config.data.alpha, config.run.seed
        write_shards(data, count, alpha, seed, folder / "shards")
        devices = [_start_device(group, config, folder, address, index) for index in range(count)]
        return _watch(group, broker, server, devices, logs, notify)


def _start_broker(
    group: Processes, logs: Path, max_packet_bytes: int
) -> tuple[Address, subprocess.Popen[bytes]]:
    address = Address(LOOPBACK, free_port())
    log = logs / "broker.log"
    command = musplit_command(
        "broker", "--listen", str(address), "--max-packet", str(max_packet_bytes)
    )
    process = group.start(command, log)
    if not wait_for_broker(address, _BROKER_START_S, lambda: process.poll() is None):
        raise FleetError(f"the embedded broker did not start: {last_line(log)}")
    return address, process


def _start_server(
    group: Processes, config: Config, folder: Path, address: Address
) -> subprocess.Popen[bytes]:
    path = folder / "emulated.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    command = musplit_command(
        "serve", str(path), "--broker", str(address), "--out", str(folder), "--format", "json"
    )
    return group.start(command, folder / "logs" / "server.log", pipe_output=True)


def _start_device(
    group: Processes, config: Config, folder: Path, address: Address, index: int
) -> _Device:
    name = f"device-{index:03d}"
    emulation = config.emulation
    speed = emulation.speed[index] if index < len(emulation.speed) else 1.0
    delay_s = emulation.delay_s[index] if index < len(emulation.delay_s) else 0.0
    command = musplit_command(
        "device", "--id", name, "--broker", str(address), "--fleet", config.run.fleet,
        "--data", str(folder / "shards" / shard_name(index)),
        "--state", str(folder / "devices" / name), "--threads", str(config.devices.threads),
        "--speed", str(speed), "--delay-s", str(delay_s),
        "--packet-limit", str(config.wire.packet_limit),
    )  # fmt: skip
    log = folder / "logs" / f"{name}.log"
    return _Device(name, command, log, group.start(command, log))


def _watch(
    group: Processes, broker: subprocess.Popen[bytes], server: subprocess.Popen[bytes],
    devices: list[_Device], logs: Path, notify: Notify,
) -> dict[str, Any]:  # fmt: skip
    """Pass on the server's progress until it ends; keep the devices running meanwhile."""
    assert server.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(server.stdout, lines), daemon=True).start()
    summary: dict[str, Any] | None = None
    while True:
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            line = b""
        if line is None:
            break
        if line.strip():
            event = json.loads(line)
            summary = event if event["event"] == "summary" else summary
            notify(event)
        if broker.poll() is not None:
            raise TransportError(f"the embedded broker ended: {last_line(logs / 'broker.log')}")
        for device in devices:
            _supervise(group, device, notify)
    code = server.wait()
    if summary is None:
        raise FleetError(f"the server ended: {_reason(logs / 'server.log')}", code)
    _let_devices_end(devices)
    del summary["event"]
    return summary


def _supervise(group: Processes, device: _Device, notify: Notify) -> None:
    code = device.process.poll()
    if not code:  # running, or at its regular end
        return
    if code in _FINAL_CODES or device.restarts >= _RESTARTS:
        raise FleetError(f"{device.name} ended: {_reason(device.log)}", code)
    device.restarts += 1
    notify({"event": "restarted", "device": device.name, "code": code})
    device.process = group.start(device.command, device.log)


def _let_devices_end(devices: list[_Device]) -> None:
    deadline_s = time.monotonic() + 5.0
    while time.monotonic() < deadline_s and any(d.process.poll() is None for d in devices):
        time.sleep(0.02)


def _reason(log: Path) -> str:
    return last_line(log).removeprefix("musplit: error: ") or f"see {log}"


def _read_lines(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
