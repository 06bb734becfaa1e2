"""The folder `musplit/` on a boot partition: all that the installer needs, on any board."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final, NamedTuple

from firmware_profiles.errors import FlashError
from firmware_profiles.provision.order import Order

FOLDER: Final = "musplit"
RECORD: Final = f"{FOLDER}/flash.json"
TOKEN: Final = f"{FOLDER}/enrol.token"
SHARD: Final = f"{FOLDER}/shard.npz"
SECRETS: Final = frozenset({TOKEN, SHARD})  # the installer moves them off the partition
IDENTITY: Final = "/var/lib/musplit/identity"


class Seed(NamedTuple):
    """Files by name, relative to the partition; wheels are read when they are written."""

    files: Mapping[str, bytes | Path]
    digest: str


def make_seed(order: Order, wheelhouse: Path) -> Seed:
    """Raises FlashError when a file of the order cannot be read."""
    own = files("firmware_profiles.provision") / "files"
    content: dict[str, bytes | Path] = {
        f"{FOLDER}/{name}": (own / name).read_bytes()
        for name in ("install.sh", "musplit-device.service")
    }
    content[f"{FOLDER}/device.env"] = _environment(order).encode()
    if order.lab.ca is not None:
        content[f"{FOLDER}/ca.pem"] = _public("--ca", order.lab.ca)
    if order.lab.signer is not None:
        content[f"{FOLDER}/signer.pub"] = _public("--signer", order.lab.signer)
    if order.lab.token:
        content[TOKEN] = f"{order.lab.token}\n".encode()
    if order.shard is not None:
        content[SHARD] = _read(order.shard)
    for path in sorted(wheelhouse.iterdir()):
        content[f"{FOLDER}/wheelhouse/{path.name}"] = path
    digest = _digest(content)
    # What the card was written for; the order of its bytes is the seed's digest.
    record = {"device_id": order.device_id, "seed_sha256": digest}
    content[RECORD] = (json.dumps(record, indent=2) + "\n").encode()
    return Seed(content, digest)


def check_same_device(record: bytes | None, order: Order, where: str) -> None:
    """Raises FlashError when the card was written for another device."""
    try:
        known = json.loads(record)["device_id"] if record is not None else order.device_id
    except (ValueError, KeyError, TypeError) as error:
        raise FlashError(f"{where}: {RECORD} is damaged; write the image again") from error
    if known != order.device_id:
        raise FlashError(
            f"{where}: was flashed as {known!r}; for another device write the image again, so that "
            "no two devices share keys"
        )


def _environment(order: Order) -> str:
    values = {
        "ID": order.device_id,
        "BROKER": order.broker,
        "FLEET": order.fleet,
        "THREADS": str(order.threads),
        "ENROL_URL": order.lab.enrol_url,
        "SECURITY": f"--identity {IDENTITY}" if order.lab.secure else "--insecure",
    }
    lines = [f'{name}="{value}"' for name, value in values.items()]
    return "# Settings of musplit-device.service; no secrets.\n" + "\n".join(lines) + "\n"


def _public(option: str, path: Path) -> bytes:
    """Everybody reads the partition: the lab's own keys must not get there by a slip."""
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise FlashError(
            f"{option} {path}: holds a private key, which stays in the lab; give the lab's "
            f"{'ca.pem' if option == '--ca' else 'signer.pub'}"
        )
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FlashError(f"{path}: cannot be read ({error.strerror})") from error


def _digest(content: Mapping[str, bytes | Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(content):
        data = content[name]
        data = data.read_bytes() if isinstance(data, Path) else data
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()
