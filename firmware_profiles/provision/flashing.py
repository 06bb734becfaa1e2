"""The three ways to a board: a card or its image, a tar for the vendor's tools, SSH."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from firmware_profiles.errors import FlashError
from firmware_profiles.provision.boot import Boot
from firmware_profiles.provision.detect import detect
from firmware_profiles.provision.order import Order
from firmware_profiles.provision.overlay import (
    flash_commands,
    overlay_bytes,
    overlay_names,
    write_overlay,
)
from firmware_profiles.provision.plan import apply_plan, make_plan
from firmware_profiles.provision.remote import current_record, install_over_ssh
from firmware_profiles.provision.seed import RECORD, Seed, check_same_device, make_seed
from firmware_profiles.provision.wheelhouse import (
    build_wheelhouse,
    check_fits,
    check_wheelhouse,
)
from firmware_profiles.schema import Image, Profile

Facts = dict[str, Any]
_UNCHANGED: Final = "nothing to do: all of it is there already"


class Flashing:
    """One order for one board. `wheels` None: a wheelhouse in the user's cache."""

    def __init__(
        self, profile: Profile, order: Order, system: str | None, wheels: Path | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._profile, self._order, self._system = profile, order, system
        self._wheels, self._say = wheels, say

    def card(self, boot: Boot, *, dry_run: bool) -> Facts:
        """Into a mounted boot partition or an image file. Raises an InputError."""
        system = detect(boot, self._profile, self._system)
        check_same_device(boot.read(RECORD), self._order, boot.where)
        seed = self._seed(system.image)
        plan = make_plan(boot, system, self._order, seed)
        if plan.pending and not dry_run:
            size_mb = sum(change.size_bytes for change in plan.pending) / 1e6
            self._say(f"writing {len(plan.pending)} files, {size_mb:.1f} MB, to {boot.where}")
            apply_plan(boot, plan)
        return self._facts(
            boot.where, system.image, [change._asdict() for change in plan.changes], dry_run,
            [boot.then], "written" if plan.pending else _UNCHANGED,
        )  # fmt: skip

    def tar(self, path: Path, *, dry_run: bool) -> Facts:
        """Into an overlay of a Jetson's root file system. Raises an InputError."""
        image = named_image(self._profile, self._system)
        if self._profile.kind != "jetson":
            raise FlashError(
                f"--overlay: {self._profile.title} is no Jetson; use --boot-dir, --image or --ssh"
            )
        if self._order.wifi is not None or self._order.login is not None:
            raise FlashError(
                "--overlay: accounts and networks of a Jetson are set up by the vendor's tools "
                "(l4t_create_default_user.sh); leave out --wifi-ssid and --ssh-key"
            )
        seed = self._seed(image)
        written = not dry_run and write_overlay(path, overlay_bytes(seed))
        changes = [
            {"name": name, "action": "create", "size_bytes": size_bytes}
            for name, size_bytes in overlay_names(seed).items()
        ]
        return self._facts(
            str(path), image, changes, dry_run, flash_commands(self._profile, path),
            "written" if written else _UNCHANGED,
        )  # fmt: skip

    def remote(self, host: str, *, dry_run: bool) -> Facts:
        """On a board that runs, over SSH. Raises an InputError."""
        image = named_image(self._profile, self._system)
        if self._order.wifi is not None or self._order.login is not None:
            raise FlashError(
                "--ssh: the board has its network and accounts; leave out --wifi-ssid and --ssh-key"
            )
        seed = self._seed(image)
        there = current_record(host)
        check_same_device(there, self._order, host)
        current = there == seed.files[RECORD]
        changes = [
            {"name": name, "action": "keep" if current else "create", "size_bytes": _size(data)}
            for name, data in seed.files.items()
        ]
        done = not dry_run and install_over_ssh(host, self._order, seed)
        return self._facts(
            host, image, changes, dry_run, [f"ssh {host} journalctl -fu musplit-device"],
            "installed" if done else _UNCHANGED,
        )  # fmt: skip

    def _seed(self, image: Image) -> Seed:
        if self._wheels is not None:
            wheelhouse = check_wheelhouse(self._wheels)
            check_fits(wheelhouse, self._profile, image)
        else:
            folder = _cache() / f"wheelhouse-{self._profile.name}-{image.name}"
            self._say(f"wheelhouse: {folder}; what it lacks is downloaded, 40 MB at the first time")
            wheelhouse = build_wheelhouse(self._profile, image, folder)
        return make_seed(self._order, wheelhouse.folder)

    def _facts(
        self, where: str, image: Image, changes: list[Facts], dry_run: bool, then: list[str],  # noqa: FBT001
        outcome: str,
    ) -> Facts:  # fmt: skip
        return {
            "device_id": self._order.device_id, "profile": self._profile.name, "where": where,
            "system": image.release, "first_boot": image.first_boot, "changes": changes,
            "dry_run": dry_run, "outcome": None if dry_run else outcome, "then": then,
        }  # fmt: skip


def named_image(profile: Profile, system: str | None) -> Image:
    """The profile's image of that name, or its first supported one. Raises FlashError."""
    fitting = [image for image in profile.images if system in (None, image.name)]
    if not fitting:
        known = ", ".join(image.name for image in profile.images)
        raise FlashError(f"--system {system}: {profile.name} knows {known}")
    supported = [image for image in fitting if image.supported]
    if not supported:
        image = fitting[0]
        raise FlashError(f"{profile.name}: {image.release} is not supported: {image.remedy}")
    return supported[0]


def _cache() -> Path:
    """The user's cache, by the XDG base directories."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "musplit"


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)
