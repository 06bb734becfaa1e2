"""Boot partitions, wheelhouses and orders for the tests of `musplit flash`."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from musplit.cli import main

needs_fat = pytest.mark.skipif(
    not all(map(shutil.which, ("mkfs.fat", "fsck.fat", "mcopy"))),
    reason="FAT images are made and checked by mtools and dosfstools, which are not installed",
)
PASSPHRASE = "correct horse battery"
TOKEN = "pi-1:b64-of-a-secret"
SSID = 'lab "2" \\ Käfer\'s'
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIL9LIgJcVI1Lz3lwrc6fkAVWza2aOJiDxqrFj8a8QtNp me@laptop"
OFFSET = 8192 * 512

_KERNEL = gzip.compress(b"\0" * 56 + b"ARM\x64" + b"\0" * 64)
_CONSOLE = b"console=serial0,115200 console=tty1 root=PARTUUID=12345678-02 rootfstype=ext4 rootwait"
_PI = {
    "config.txt": b"# comment\narm_64bit=1\n", "kernel8.img": _KERNEL, "kernel_2712.img": _KERNEL,
    "bcm2711-rpi-4-b.dtb": b"tree", "issue.txt": b"Raspberry Pi reference 2025-05-13\n",
}  # fmt: skip
_SEEDS = {"user-data": b"#cloud-config\n", "meta-data": b"instance_id: rpios-image\n",
          "network-config": b"# nothing\n"}  # fmt: skip
# What the boot partitions of real images hold, as far as anything looks at it.
PARTITIONS: dict[str, dict[str, bytes]] = {
    "bookworm": {
        **_PI,
        "cmdline.txt": _CONSOLE + b" quiet init=/usr/lib/raspberrypi-sys-mods/firstboot\n",
    },
    "trixie": {**_PI, **_SEEDS, "cmdline.txt": _CONSOLE + b" resize\n"},
    "ubuntu-24.04": {
        "config.txt": b"[all]\nkernel=vmlinuz\narm_64bit=1\n", "vmlinuz": _KERNEL,
        "bcm2711-rpi-4-b.dtb": b"tree", "cmdline.txt": _CONSOLE + b"\n", **_SEEDS,
    },
    "preseed": {**_PI, "cmdline.txt": _CONSOLE + b" resize\n", "rpi-preseed.toml": b"# empty\n"},
}  # fmt: skip
_IMAGE = """
[[images]]
name = "{name}"
release = "{release}"
python = "{python}"
glibc = "2.39"
first_boot = "{first_boot}"
supported = {supported}
remedy = "{remedy}"
source = "made for the tests"
"""


def profile_file(folder: Path) -> Path:
    """The Raspberry Pi 4B with one image of every format, and one that is not supported."""
    text = (files("firmware_profiles") / "boards" / "rpi-4b.toml").read_text()
    first, rest = text.split("[[images]]", 1)
    rest = "[runtime]" + rest.split("[runtime]", 1)[1]
    images = (
        ("bookworm", "Bookworm", "3.11", "firstrun", "true", "its own Python"),
        ("trixie", "Trixie", "3.13", "cloud-init", "true", "its own Python"),
        ("ubuntu-24.04", "Ubuntu Server 24.04", "3.12", "cloud-init", "true", "its own Python"),
        ("preseed", "Trixie with preseed", "3.13", "rpi-preseed", "true", "its own Python"),
        ("bullseye", "Bullseye", "3.9", "firstrun", "false", "Python 3.9 is too old: Bookworm"),
    )
    keys = ("name", "release", "python", "first_boot", "supported", "remedy")
    entries = "".join(_IMAGE.format(**dict(zip(keys, image, strict=True))) for image in images)
    path = folder / "board.toml"
    path.write_text(first + entries + rest)
    return path


def make_wheelhouse(folder: Path, python: str) -> Path:
    """Of the right form, with a wheel that is none: enough for whatever does not install it."""
    folder.mkdir()
    content = {
        "demo-1.0-py3-none-any.whl": b"demo", "requirements.txt": b"demo==1.0\n",
        "python": f"{python}\n".encode(), "machine": b"aarch64\n", "made-for.json": b"{}\n",
    }  # fmt: skip
    for name, data in content.items():
        (folder / name).write_bytes(data)
    sums = [f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in content.items()]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    return folder


def make_image(
    path: Path, content: dict[str, bytes], bits: int = 32, size_mb: int = 40
) -> Path:  # fmt: skip
    """A card's image: a partition table and one FAT partition with these files."""
    fat = path.with_suffix(".fat")
    with fat.open("wb") as file:
        file.truncate(size_mb << 20)
    # One sector per cluster: otherwise FAT32 needs a far larger partition.
    _run("mkfs.fat", "-F", str(bits), "-s", "1" if bits == 32 else "4", "-n", "bootfs", str(fat))
    for name, data in content.items():
        _run("mcopy", "-i", str(fat), "-", f"::/{name}", data=data)
    table = bytearray(512)
    struct.pack_into("<B3xB3xII", table, 446, 0, 0x0C, OFFSET // 512, (size_mb << 20) // 512)
    table[510:] = b"\x55\xaa"
    with path.open("wb") as file:
        file.write(table)
        file.seek(OFFSET)
        file.write(fat.read_bytes())
    fat.unlink()
    return path


def make_folder(folder: Path, content: dict[str, bytes]) -> Path:
    """A mounted boot partition."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def unpack(image: Path, folder: Path) -> Path:
    """All files of the image's partition."""
    folder.mkdir()
    _run("mcopy", "-s", "-i", f"{image}@@{OFFSET}", "::/*", str(folder))
    return folder


class Desk:
    """What lies on a person's desk: keys, tokens, a shard, wheelhouses, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profile = profile_file(folder)
        for name, text in {
            "ca.pem": "certificate", "signer.pub": "public key", "token": f"{TOKEN}\n",
            "passphrase": f"{PASSPHRASE}\n", "key.pub": f"{KEY}\n", "shard.npz": "numbers",
        }.items():  # fmt: skip
            (folder / name).write_text(text)

    def wheels(self, python: str) -> Path:
        folder = self.folder / f"wheels-{python}"
        return folder if folder.exists() else make_wheelhouse(folder, python)

    def secure(self) -> list[str]:
        return [
            "--ca", str(self.folder / "ca.pem"), "--token-file", str(self.folder / "token"),
            "--enrol-url", "https://192.168.1.10:8884", "--shard", str(self.folder / "shard.npz"),
        ]  # fmt: skip

    def network(self) -> list[str]:
        return [
            "--wifi-ssid", SSID, "--wifi-country", "DE", "--ssh-key", str(self.folder / "key.pub"),
            "--wifi-passphrase-file", str(self.folder / "passphrase"),
        ]  # fmt: skip

    def flash(self, *options: str, python: str = "3.11", device_id: str = "pi-1") -> Result:
        return CliRunner().invoke(
            main,
            ["flash", "--profile", str(self.profile), "--device-id", device_id, "--broker",
             "192.168.1.10", "--wheelhouse", str(self.wheels(python)), *options],
        )  # fmt: skip

    def flashed(self, *options: str, python: str = "3.11") -> dict[str, Any]:
        """The facts of a run that must succeed."""
        done = self.flash(*options, "--format", "json", python=python)
        assert done.exit_code == 0, done.output
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts


def _run(*command: str, data: bytes = b"") -> None:
    subprocess.run(command, input=data, check=True, capture_output=True)
