"""`musplit emulate`: broker, server and devices as processes on this machine, watched and ended.

What is killed is started again: the broker on its port, the server with --resume, a device with
its state. An emulation that was stopped as a whole goes on from its folder.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from emulation.broker import LOOPBACK, free_port, wait_for_broker
from emulation.emulated import TURNS_FOLDER, emulated_rows, late_steps
from emulation.errors import FleetError, FleetFileError
from emulation.fleet import EmulatedDevice, load_fleet, overload, save_fleet, saved_fleet
from emulation.link import shaped_links
from emulation.processes import Processes, last_line, musplit_command, processes, wait_unlocked
from emulation.supervise import Supervised
from server_node.config import Config, load_config, to_toml
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from server_node.files import CONFIG_FILE, LOCK_FILE, replace_file
from server_node.journal import JOURNAL_FILE
from server_node.partition import shard_name, write_shards
from server_node.summary_file import write_summary
from wire_protocol.errors import RefusedError, TransportError
from wire_protocol.mqtt import Address

EMULATED_FILE: Final = "emulated.toml"
_BROKER_START_S: Final = 20.0
_POLL_S: Final = 0.1
# How long processes of an emulator that was killed may take to end: theirs is 5 s and some more.
_ORPHANS_S: Final = 15.0
# Exit codes after which starting a device again cannot help.
_FINAL_CODES: Final = (2, 3, RefusedError.exit_code)
# Of `musplit broker`: it was asked to end, or the broker under it was.
_BROKER_STOPPED: Final = (0, TransportError.exit_code)

Notify = Callable[[dict[str, Any]], None]


def emulate(
    config: Config, folder: Path, notify: Notify, *, resume: bool = False
) -> dict[str, Any]:
    """Run the whole experiment; returns the summary. Everything started is stopped again.

    Raises FleetError when a process ends with an error, with that error's text.
    """
    if not resume and any((folder / name).exists() for name in (EMULATED_FILE, JOURNAL_FILE)):
        raise ConfigError(
            f"{folder}: holds a run already; give another --out, remove it, or go on with it: "
            f"musplit emulate --resume {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        locks = [folder / LOCK_FILE, *sorted((folder / "devices").glob(f"*/{LOCK_FILE}"))]
        wait_unlocked(locks, _ORPHANS_S)
    fleet = _fleet(config, folder, notify, resume=resume)
    broker = Address(LOOPBACK, free_port())
    links = [device.link for device in fleet]
    with shaped_links(links, broker, config.run.seed) as ways, processes() as group:
        emulation = _Emulation(group, config, folder, notify, broker, resume=resume)
        summary = emulation.run([Place(*pair) for pair in zip(fleet, ways, strict=True)])
    if fleet:
        rows = emulated_rows(fleet, folder, config, summary["bundle_sha256"])
        summary["emulated"] = rows
        write_summary(folder, summary)
        _warn(notify, late_steps(rows))
    return summary


def _fleet(config: Config, folder: Path, notify: Notify, *, resume: bool) -> list[EmulatedDevice]:
    """The boards that the devices stand for; empty: none. Raises FleetFileError."""
    path = config.emulation.fleet
    if not path:
        return []
    fleet = saved_fleet(folder) if resume else load_fleet(Path(path))
    if len(fleet) != config.devices.count:
        raise FleetFileError(
            f"{path}: has {len(fleet)} devices, and devices.count is {config.devices.count}"
        )
    if not resume:
        save_fleet(fleet, folder)
    _warn(notify, overload(fleet))
    return fleet


def _warn(notify: Notify, text: str) -> None:
    if text:
        notify({"event": "warning", "text": text})


def emulated_config(folder: Path) -> Config:
    """The configuration of the emulation in a run folder. Raises ConfigError."""
    for path in (folder / CONFIG_FILE, folder / EMULATED_FILE):
        if path.is_file():
            return load_config(path, [])
    raise ConfigError(f"{folder}: holds no run ({CONFIG_FILE} is missing); nothing to resume")


class Place(NamedTuple):
    """A device of the fleet, and where its link begins."""

    device: EmulatedDevice
    way: Address


class _Emulation:
    """The processes of one emulation, and what keeps them running."""

    def __init__(
        self, group: Processes, config: Config, folder: Path, notify: Notify, broker: Address, *,
        resume: bool,
    ) -> None:  # fmt: skip
        self._group, self._config, self._folder = group, config, folder
        self._address = broker
        self._places: list[Place] = []
        self._notify, self._resume = notify, resume
        self._logs = folder / "logs"
        self._devices: list[Supervised] = []
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._summary: dict[str, Any] | None = None

    def run(self, places: list[Place]) -> dict[str, Any]:
        """Start everything, watch it until the server has ended.

        `places`: what the devices stand for; empty when they stand for nothing.
        """
        config, folder = self._config, self._folder
        self._places = places
        self._broker = self._start_broker()
        toml = to_toml(config).encode()
        replace_file(folder / EMULATED_FILE, lambda file: file.write(toml))
        self._server = Supervised(
            self._group, "server", self._logs / "server.log", self._server_command,
            pipe_output=True,
        )  # fmt: skip
        self._read_server()
        # The server exports its model meanwhile. The same configuration gives the same shards.
        data = load_dataset(config.data)
        count, alpha, seed = config.devices.count, config.data.alpha, config.run.seed
        write_shards(data, count, alpha, seed, folder / "shards")
        if not self._resume:  # one that resumes may need no devices any more, and says if it does
            self._start_devices()
        while self._take_line():
            self._supervise()
        if self._summary is None:
            raise FleetError(
                f"the server ended: {_reason(self._server.log)}", self._server.code or 1
            )
        self._let_devices_end()
        return self._summary

    # -- starting ----------------------------------------------------------------------------

    def _start_broker(self) -> Supervised:
        limit = str(self._config.emulation.max_packet_bytes)
        command = musplit_command("broker", "--listen", str(self._address), "--max-packet", limit)
        broker = Supervised(
            self._group, "broker", self._logs / "broker.log", lambda: command,
            outside=_BROKER_STOPPED,
        )  # fmt: skip
        if not wait_for_broker(self._address, _BROKER_START_S, lambda: broker.code is None):
            raise FleetError(f"the embedded broker did not start: {last_line(broker.log)}")
        return broker

    def _server_command(self) -> list[str]:
        """The first start makes the run folder; once its configuration is there, it is resumed."""
        begun = self._resume and (self._folder / CONFIG_FILE).is_file()
        self._resume = True
        folder = str(self._folder)
        what = ("--resume", folder) if begun else (f"{folder}/{EMULATED_FILE}", "--out", folder)
        return musplit_command("serve", *what, "--broker", str(self._address), "--format", "json")

    def _read_server(self) -> None:
        stream = self._server.process.stdout
        assert stream is not None
        self._lines = queue.Queue()
        threading.Thread(target=_read_lines, args=(stream, self._lines), daemon=True).start()

    def _start_devices(self) -> None:
        """All devices, or those that an earlier start of the server has sent home."""
        if not self._devices:
            self._devices = [self._device(index) for index in range(self._config.devices.count)]
        for device in self._devices:
            if device.code == 0:
                device.restart()

    def _device(self, index: int) -> Supervised:
        name = f"device-{index:03d}"
        folder = self._folder
        how = self._stands_for(index) if self._places else self._slowed(index)
        command = musplit_command(
            "device", "--id", name, *how,
            "--fleet", self._config.run.fleet, "--data", str(folder / "shards" / shard_name(index)),
            "--state", str(folder / "devices" / name),
            "--packet-limit", str(self._config.wire.packet_limit),
            "--meter", "model",  # this machine's meter would count all devices in each
        )  # fmt: skip
        return Supervised(self._group, name, self._logs / f"{name}.log", lambda: command)

    def _slowed(self, index: int) -> list[str]:
        """Options of a device that is this machine, slowed down."""
        emulation, threads = self._config.emulation, self._config.devices.threads
        speed = emulation.speed[index] if index < len(emulation.speed) else 1.0
        delay_s = emulation.delay_s[index] if index < len(emulation.delay_s) else 0.0
        return [
            "--broker", str(self._address), "--threads", str(threads),
            "--speed", str(speed), "--delay-s", str(delay_s),
        ]  # fmt: skip

    def _stands_for(self, index: int) -> list[str]:
        """Options of a device that stands for a board, on its link."""
        device, way = self._places[index]
        path = self._folder / "devices" / f"device-{index:03d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.encode(device.stand_in(self._folder / TURNS_FOLDER)))
        return [
            "--broker", str(way), "--threads", str(device.threads),
            "--stand-in", str(path),
        ]  # fmt: skip

    # -- watching ----------------------------------------------------------------------------

    def _take_line(self) -> bool:
        """Pass on an event of the server's; False when it has ended for good."""
        try:
            line = self._lines.get(timeout=_POLL_S)
        except queue.Empty:
            return True
        if line is None:
            return self._server_ended()
        if line.endswith(b"\n"):  # otherwise its writer was killed
            event = json.loads(line)
            if event["event"] == "summary":
                self._summary = {key: value for key, value in event.items() if key != "event"}
            elif event["event"] == "waiting":
                self._start_devices()
            self._notify(event)
        return True

    def _server_ended(self) -> bool:
        code = self._server.process.wait()
        if self._summary is not None or not (code < 0 or code == TransportError.exit_code):
            return False
        if not self._restart(self._server, code):
            return False
        self._read_server()
        return True

    def _supervise(self) -> None:
        code = self._broker.code
        if code is not None and not self._restart(self._broker, code):
            raise TransportError(f"the embedded broker ended: {last_line(self._broker.log)}")
        for device in self._devices:
            code = device.code
            if code and (code in _FINAL_CODES or not self._restart(device, code)):
                raise FleetError(f"{device.name} ended: {_reason(device.log)}", code)

    def _restart(self, process: Supervised, code: int) -> bool:
        again = process.restart()
        if again:
            why = _reason(process.log)
            self._notify({"event": "restarted", "process": process.name, "code": code, "why": why})
        return again

    def _let_devices_end(self) -> None:
        deadline_s = time.monotonic() + 5.0
        while time.monotonic() < deadline_s and any(d.code is None for d in self._devices):
            time.sleep(0.02)


def _reason(log: Path) -> str:
    return last_line(log).removeprefix("musplit: error: ") or f"see {log}"


def _read_lines(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
