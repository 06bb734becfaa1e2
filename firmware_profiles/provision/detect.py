"""What lies on a boot partition, and whether it suits the profile. Nothing is written here."""

from __future__ import annotations

import re
import zlib
from typing import Final, NamedTuple

from firmware_profiles.errors import FlashError
from firmware_profiles.provision import cloud_init, firstrun, preseed
from firmware_profiles.provision.boot import Boot
from firmware_profiles.schema import FirstBoot, Image, Profile

CMDLINE: Final = "cmdline.txt"
_CONFIG: Final = "config.txt"
_ISSUE: Final = "issue.txt"  # of Raspberry Pi OS: the date of its image
_PRESEED_SINCE: Final = "2026-07"
_KERNELS: Final = ("kernel8.img", "vmlinuz", "current/vmlinuz")
# A 64-bit image has none of these; with them even a 64-bit kernel runs 32-bit programs.
_KERNELS_32: Final = ("kernel.img", "kernel7.img", "kernel7l.img")
_ARM32_MAGIC: Final = (0x24, b"\x18\x28\x6f\x01")  # of a zImage
# Device trees are named by the chip; several chips share one name.
_TREES: Final = {
    "RP3A0": "bcm2710", "BCM2710": "bcm2710", "BCM2837": "bcm2710", "BCM2711": "bcm2711",
    "BCM2712": "bcm2712",
}  # fmt: skip


class System(NamedTuple):
    """What runs on the card: the profile's image, and where it keeps its kernel command line."""

    image: Image
    cmdline: str  # the file's text


def detect(boot: Boot, profile: Profile, system: str | None) -> System:
    """The one supported image of the profile that this partition fits.

    `system`: its name, for partitions that fit several. Raises FlashError with the reason.
    """
    names = boot.names()
    if not names & {_CONFIG, CMDLINE} or CMDLINE not in names:
        raise FlashError(
            f"{boot.where}: no boot partition of a Raspberry Pi: it lacks {_CONFIG} or {CMDLINE}"
        )
    _check_64_bit(boot, names)
    _check_board(boot, names, profile)
    cmdline = (boot.read(CMDLINE) or b"").decode(errors="replace")
    if "ds=nocloud" in cmdline and "i=musplit-" not in cmdline:
        raise _customised(boot, f"{CMDLINE} names another cloud-init instance")
    first_boot = _format(boot, names, cmdline)
    return System(_choose(boot, profile, system, first_boot, cmdline, names), cmdline)


def _check_64_bit(boot: Boot, names: set[str]) -> None:
    remedy = "onnxruntime has no 32-bit wheels; write a 64-bit image (arm64)"
    config = (boot.read(_CONFIG) or b"").decode(errors="replace")
    settings = [line.split("#")[0].replace(" ", "").strip() for line in config.splitlines()]
    if "arm_64bit=0" in settings:
        raise FlashError(f"{boot.where}: {_CONFIG} sets arm_64bit=0, a 32-bit kernel: {remedy}")
    for name in _KERNELS_32:
        if name in names:
            raise FlashError(f"{boot.where}: {name} marks a 32-bit system: {remedy}")
    kernels = [kernel for name in _KERNELS if (kernel := boot.read(name)) is not None]
    if not kernels:
        raise FlashError(f"{boot.where}: has no 64-bit kernel (kernel8.img or vmlinuz): {remedy}")
    at, magic = _ARM32_MAGIC
    for kernel in kernels:
        if _start(kernel)[at : at + len(magic)] == magic:
            raise FlashError(f"{boot.where}: its kernel is a 32-bit one: {remedy}")


def _start(kernel: bytes) -> bytes:
    """The first bytes of a kernel, unpacked."""
    if kernel[:2] != b"\x1f\x8b":
        return kernel[:64]
    try:
        return zlib.decompressobj(wbits=31).decompress(kernel, 64)
    except zlib.error:
        return b""


def _check_board(boot: Boot, names: set[str], profile: Profile) -> None:
    trees = {tree for chip, tree in _TREES.items() if chip in profile.cpu.model.upper()}
    if not trees:
        raise FlashError(
            f"profile {profile.name}: not a Raspberry Pi; it takes no boot partition "
            "(Jetson: --overlay or --ssh; a laptop: pip install musplit)"
        )
    files = names | boot.names("current")
    if not any(name.startswith(tuple(trees)) and name.endswith(".dtb") for name in files):
        raise FlashError(
            f"{boot.where}: not an image for {profile.title}: it has no {'/'.join(trees)}*.dtb; "
            "take a newer image, or the right one"
        )


def _format(boot: Boot, names: set[str], cmdline: str) -> FirstBoot:
    """The format of the first boot: the newest one that the partition has a sign of."""
    if preseed.FILE in names:
        _check_ours(boot, preseed.FILE, allow_comments=True)
        return "rpi-preseed"
    if cloud_init.USER_DATA in names or cloud_init.META_DATA in names:
        return "cloud-init"
    if firstrun.SCRIPT in names:
        _check_ours(boot, firstrun.SCRIPT, allow_comments=False)
    if "custom.toml" in names:
        raise _customised(boot, "custom.toml lies there")
    # Images that read rpi-preseed.toml bring none: their age tells them from the first Trixie.
    issued = re.search(r"\d{4}-\d\d-\d\d", (boot.read(_ISSUE) or b"").decode(errors="replace"))
    return (
        "rpi-preseed"
        if issued is not None and issued[0] >= _PRESEED_SINCE and _trixie(cmdline)
        else "firstrun"
    )


def _trixie(cmdline: str) -> bool:
    """Raspberry Pi OS Trixie grows its root file system from its initramfs; Bookworm does not."""
    return "resize" in cmdline.split()


def _check_ours(boot: Boot, name: str, *, allow_comments: bool) -> None:
    text = (boot.read(name) or b"").decode(errors="replace")
    if "Written by musplit flash." in text:
        return
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines or not allow_comments:
        raise _customised(boot, f"{name} is another tool's")


def _customised(boot: Boot, why: str) -> FlashError:
    return FlashError(
        f"{boot.where}: customised already ({why}); write the image again, without the imager's "
        "customisation"
    )


def _choose(
    boot: Boot, profile: Profile, system: str | None, first_boot: FirstBoot, cmdline: str,
    names: set[str],
) -> Image:  # fmt: skip
    images = profile.images
    if system is not None:
        images = [image for image in images if image.name == system]
        if not images:
            known = ", ".join(image.name for image in profile.images)
            raise FlashError(f"--system {system}: {profile.name} knows {known}")
        if images[0].first_boot == "rpi-preseed" and preseed.FILE not in names:
            return _supported(boot, images[0])  # such images have no sign of their own
    fitting = [image for image in images if image.first_boot == first_boot]
    if system is not None and not fitting:
        raise FlashError(
            f"{boot.where}: is set up by {first_boot} at its first boot, and --system {system} by "
            f"{images[0].first_boot}; leave out --system, or take that image"
        )
    if system is None:
        ubuntu = _ISSUE not in names
        fitting = [image for image in fitting if image.name.startswith("ubuntu") == ubuntu]
        if any("trixie" in image.name for image in fitting):
            trixie = _trixie(cmdline)
            fitting = [image for image in fitting if ("trixie" in image.name) == trixie]
    if not fitting:
        raise FlashError(
            f"{boot.where}: {profile.name} knows no image that is set up by {first_boot} like this "
            f"one; `musplit profiles show {profile.name}` lists what it knows"
        )
    supported = [image for image in fitting if image.supported]
    if len(supported) > 1:
        known = ", ".join(image.name for image in supported)
        raise FlashError(f"{boot.where}: may be one of {known}; say which with --system")
    return _supported(boot, (supported or fitting)[0])


def _supported(boot: Boot, image: Image) -> Image:
    if not image.supported:
        raise FlashError(f"{boot.where}: {image.release} is not supported: {image.remedy}")
    return image
