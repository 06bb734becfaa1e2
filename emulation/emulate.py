"""`musplit emulate`: broker, server and devices as processes on this machine, watched and ended.

What is killed is started again (emulation.run). An emulation that was stopped as a whole goes on
from its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from edge_client.bundle import read_bundle
from emulation.emulated import TURNS_FOLDER, emulated_rows, late_steps
from emulation.errors import FleetFileError
from emulation.fleet import (
    FLEET_FILE,
    EmulatedDevice,
    Fleet,
    load_fleet,
    save_fleet,
    saved_fleet,
)
from emulation.link import shaped_links
from emulation.processes import processes, wait_unlocked
from emulation.run import EMULATED_FILE, EmulatedRun, Notify, Place
from emulation.slow_motion import settle
from server_node.config import Config, load_config
from server_node.errors import ConfigError
from server_node.files import CONFIG_FILE, LOCK_FILE
from server_node.journal import JOURNAL_FILE
from server_node.summary_file import write_summary
from wire_protocol.manifest import CLIENT_FOLDER

# How long processes of an emulator that was killed may take to end: theirs is 5 s and some more.
_ORPHANS_S: Final = 15.0


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
    begun = resume and (folder / FLEET_FILE).exists()
    fleet = None if begun or not config.emulation.fleet else _fleet(config)
    with processes() as group:
        run = EmulatedRun(group, config, folder, notify, resume=resume)
        run.start()
        boards = saved_fleet(folder) if begun else []
        if fleet is not None:
            run.wait_for_server()
            boards = _settle(fleet, config, folder, notify)
        links = [board.link_here for board in boards]
        with shaped_links(links, run.address, config.run.seed) as ways:
            summary = run.run([Place(*pair) for pair in zip(boards, ways, strict=True)])
    if boards:
        manifest = read_bundle(folder / CLIENT_FOLDER).manifest
        rows = emulated_rows(boards, folder, config, manifest)
        summary["emulated"] = rows
        write_summary(folder, summary)
        _warn(notify, late_steps(rows))
    return summary


def _fleet(config: Config) -> Fleet:
    """The boards that the devices stand for. Raises FleetFileError."""
    path = config.emulation.fleet
    fleet = load_fleet(Path(path))
    if len(fleet.devices) != config.devices.count:
        raise FleetFileError(
            f"{path}: has {len(fleet.devices)} devices, and devices.count is {config.devices.count}"
        )
    return fleet


def _settle(fleet: Fleet, config: Config, folder: Path, notify: Notify) -> list[EmulatedDevice]:
    """Choose the slow motion, say so, and keep it for who resumes. Raises PaceError."""
    bundle = read_bundle(folder / CLIENT_FOLDER)
    devices, note, warning = settle(fleet, bundle, config, folder / TURNS_FOLDER)
    save_fleet(devices, folder)
    if note:
        notify({"event": "slow-motion", "text": note})
    _warn(notify, warning)
    return devices


def _warn(notify: Notify, text: str) -> None:
    if text:
        notify({"event": "warning", "text": text})


def emulated_config(folder: Path) -> Config:
    """The configuration of the emulation in a run folder. Raises ConfigError."""
    for path in (folder / CONFIG_FILE, folder / EMULATED_FILE):
        if path.is_file():
            return load_config(path, [])
    raise ConfigError(f"{folder}: holds no run ({CONFIG_FILE} is missing); nothing to resume")
