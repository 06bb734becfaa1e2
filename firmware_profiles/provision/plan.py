"""What flashing writes, before and while it does. The kernel command line comes last.

Until that line is there the card boots as it would have; a run that was cut off can be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

from firmware_profiles.errors import FlashError
from firmware_profiles.provision import cloud_init, firstrun, preseed
from firmware_profiles.provision.boot import Boot
from firmware_profiles.provision.detect import CMDLINE, System
from firmware_profiles.provision.order import Order
from firmware_profiles.provision.seed import FOLDER, Seed

Action = Literal["create", "replace", "keep", "remove"]
WHEELS: Final = f"{FOLDER}/wheelhouse"


class Change(NamedTuple):
    """One file; never its content, which may be a secret."""

    name: str
    action: Action
    size_bytes: int


class Plan(NamedTuple):
    """The changes, in the order in which they are made."""

    changes: list[Change]
    files: Mapping[str, bytes | Path]

    @property
    def pending(self) -> list[Change]:
        """Those that change something."""
        return [change for change in self.changes if change.action != "keep"]


def make_plan(boot: Boot, system: System, order: Order, seed: Seed) -> Plan:
    """Compares what is there with what is to be there. Raises FlashError when it has no room."""
    files = dict(seed.files) | first_boot_files(system, order, seed)
    changes = [
        Change(name, "remove", 0)
        for name in sorted(boot.names(WHEELS))
        if f"{WHEELS}/{name}" not in files
    ]
    changes = [change._replace(name=f"{WHEELS}/{change.name}") for change in changes]
    for name, data in files.items():
        wanted = _bytes(data)
        there = boot.read(name)
        action: Action = "create" if there is None else "keep" if there == wanted else "replace"
        changes.append(Change(name, action, len(wanted)))
    plan = Plan(changes, files)
    _check_room(boot, plan)
    return plan


def _check_room(boot: Boot, plan: Plan) -> None:
    """Before anything is written. What is replaced lies there twice for a moment, one at a time."""
    new = [change.size_bytes for change in plan.pending if change.action == "create"]
    replaced = [change.size_bytes for change in plan.pending if change.action == "replace"]
    needed, free = sum(new) + max(replaced, default=0), boot.free_bytes()
    if needed > free:
        raise FlashError(
            f"{boot.where}: the boot partition has no room: {needed / 1e6:.1f} MB needed, "
            f"{free / 1e6:.1f} MB free; write the image afresh"
        )


def first_boot_files(system: System, order: Order, seed: Seed) -> dict[str, bytes]:
    """The files of the image's own first-boot format; cmdline.txt last."""
    match system.image.first_boot:
        case "firstrun":
            files = firstrun.firstrun_files(order)
            files[CMDLINE] = firstrun.with_firstrun(system.cmdline).encode()
        case "cloud-init":
            files = cloud_init.cloud_init_files(order, seed.digest)
            instance = cloud_init.instance_id(order, seed.digest)
            files[CMDLINE] = cloud_init.with_cloud_init(system.cmdline, instance).encode()
        case _:
            files = preseed.preseed_files(order)
    return files


def apply_plan(boot: Boot, plan: Plan) -> None:
    """Make the changes. Raises FlashError."""
    for change in plan.pending:
        if change.action == "remove":
            boot.remove(change.name)
        else:
            boot.write(change.name, _bytes(plan.files[change.name]))


def _bytes(data: bytes | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data
