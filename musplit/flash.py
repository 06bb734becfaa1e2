"""`musplit flash` and `musplit wheelhouse`: from a blank card to a device that takes part."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from musplit.support import fail, format_option, guarded, say

_SHOWN = {"create": "+", "replace": "~", "remove": "-", "keep": " "}


@click.command()
@click.option("--profile", "profile_name", required=True, metavar="P",
              help="The board, e.g. rpi-4b, or a profile of your own (.toml).")  # fmt: skip
@click.option("--device-id", required=True, metavar="D", help="The device's name in the fleet.")
@click.option("--broker", required=True, metavar="HOST[:PORT]", help="The lab's MQTT broker.")
@click.option("--fleet", default="lab", show_default=True, help="The server's run.fleet.")
@click.option("--boot-dir", type=click.Path(path_type=Path), metavar="DIR",
              help="The card's first partition, mounted here.")  # fmt: skip
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE",
              help="An image file, unpacked; needs mtools, neither root nor a mount.")  # fmt: skip
@click.option("--overlay", type=click.Path(path_type=Path), metavar="TAR",
              help="Jetson: write a tar for the root file system of the vendor's tools."
              )  # fmt: skip
@click.option("--ssh", "host", metavar="[USER@]HOST",
              help="A board that runs: install over SSH, as root or by sudo without password."
              )  # fmt: skip
@click.option("--system", metavar="NAME",
              help="Which image of the profile it is, where files do not tell.")  # fmt: skip
@click.option("--ca", type=click.Path(path_type=Path), metavar="FILE",
              help="The lab's ca.pem: TLS with a certificate of its own.")  # fmt: skip
@click.option("--signer", type=click.Path(path_type=Path), metavar="FILE",
              help="The lab's signer.pub.  [default: beside --ca, else from enrolment]"
              )  # fmt: skip
@click.option("--token-file", type=click.Path(path_type=Path, allow_dash=True), metavar="FILE",
              help="The one-time enrolment token; - reads it from stdin.")  # fmt: skip
@click.option("--enrol-url", default="", metavar="URL", help="Of the lab's enrolment service.")
@click.option("--insecure", is_flag=True, help="A plain link, without TLS; instead of --ca.")
@click.option("--shard", type=click.Path(path_type=Path), metavar="FILE", help="The data shard.")
@click.option("--wifi-ssid", metavar="NAME", help="Join this Wi-Fi network.")
@click.option("--wifi-passphrase-file", type=click.Path(path_type=Path, allow_dash=True),
              metavar="FILE",
              help="Its passphrase; - reads it from stdin. Asked for when left out.")  # fmt: skip
@click.option("--wifi-country", default="", metavar="CC", help="Two letters, as radios require.")
@click.option("--ssh-key", type=click.Path(path_type=Path), metavar="FILE",
              help="A public key (.pub) that may log in, with sudo.")  # fmt: skip
@click.option("--user", default="pi", show_default=True, help="The account of --ssh-key.")
@click.option("--wheelhouse", "wheels", type=click.Path(path_type=Path), metavar="DIR",
              help="From `musplit wheelhouse`.  [default: built in the user's cache]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@format_option
def flash(
    profile_name: str, device_id: str, broker: str, fleet: str, boot_dir: Path | None,
    image: Path | None, overlay: Path | None, host: str | None, system: str | None,
    ca: Path | None, signer: Path | None, token_file: Path | None, enrol_url: str, insecure: bool,
    shard: Path | None, wifi_ssid: str | None, wifi_passphrase_file: Path | None,
    wifi_country: str, ssh_key: Path | None, user: str, wheels: Path | None, dry_run: bool,
    output: str,
) -> None:  # fmt: skip
    """Write what turns a freshly written card into a device that enrols, joins and trains.

    The files of the image's own first-boot format, which is found out, and a folder musplit/ with
    an installer, wheels with hashes, certificates, token and shard. Nothing is downloaded on the
    board. A second run changes nothing; a wrong image is refused with the reason.

    \b
    musplit flash --profile rpi-4b --device-id pi-1 --broker 192.168.1.10 --boot-dir /media/bootfs
                  --ca lab/ca.pem --token-file pi-1.token --enrol-url https://192.168.1.10:8884
                  --shard shards/shard-000.npz --wifi-ssid lab --wifi-country DE
    musplit flash ... --image 2025-05-13-raspios-bookworm-arm64-lite.img --dry-run
    """
    places = {"--boot-dir": boot_dir, "--image": image, "--overlay": overlay, "--ssh": host}
    if sum(place is not None for place in places.values()) != 1:
        fail(f"flash: give one of {', '.join(places)}", 2)
    if (ca is not None) == insecure or (ca is not None and token_file is None):
        fail("flash: give --ca FILE with --token-file and --enrol-url, or type --insecure", 2)
    if token_file is not None and str(token_file) == str(wifi_passphrase_file) == "-":
        fail("flash: stdin holds one secret; give a file for the other", 2)
    with guarded():
        from firmware_profiles.catalogue import load_profile
        from firmware_profiles.provision.boot import FolderBoot, ImageBoot
        from firmware_profiles.provision.flashing import Flashing
        from firmware_profiles.provision.order import Lab, Login, Order, Wifi

        profile = load_profile(profile_name)
        lab = Lab()
        if ca is not None:
            beside = ca.with_name("signer.pub")
            found = signer or (beside if beside.is_file() else None)
            lab = Lab(ca, found, _secret(token_file, "--token-file"), enrol_url)
        wifi = None
        if wifi_ssid is not None:
            passphrase = (
                _secret(wifi_passphrase_file, "--wifi-passphrase-file")
                if wifi_passphrase_file is not None
                else click.prompt(f"Passphrase of {wifi_ssid}", hide_input=True, err=True)
            )
            wifi = Wifi.of(wifi_ssid, passphrase, wifi_country)
        key = ssh_key.read_text(encoding="utf-8", errors="replace") if ssh_key else None
        order = Order(
            device_id, broker, fleet, profile.runtime.threads, lab, wifi,
            Login.of(user, key) if key is not None else None, shard,
        )  # fmt: skip
        order.check()
        flashing = Flashing(profile, order, system, wheels, say)
        if boot_dir is not None:
            facts = flashing.card(FolderBoot(boot_dir), dry_run=dry_run)
        elif image is not None:
            facts = flashing.card(ImageBoot(image), dry_run=dry_run)
        elif overlay is not None:
            facts = flashing.tar(overlay, dry_run=dry_run)
        else:
            assert host is not None
            facts = flashing.remote(host, dry_run=dry_run)
    if output == "json":
        print(json.dumps(facts))
    else:
        _print(facts)


@click.command()
@click.option("--profile", "profile_name", required=True, metavar="P", help="The board.")
@click.option("--system", metavar="NAME",
              help="Which image of the profile.  [default: the first that is supported]"
              )  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder of its own to fill.")  # fmt: skip
@format_option
def wheelhouse(profile_name: str, system: str | None, out: Path, output: str) -> None:
    """Download the wheels that a board needs, with hashes, musplit's own and pip's among them.

    The versions are those installed here, onnxruntime's the profile's pin. Downloads nothing when
    OUT holds just this already.

    \b
    musplit wheelhouse --profile rpi-4b --out wheels-rpi-4b
    """
    with guarded():
        from firmware_profiles.catalogue import load_profile
        from firmware_profiles.provision.flashing import named_image
        from firmware_profiles.provision.wheelhouse import build_wheelhouse

        profile = load_profile(profile_name)
        say(f"{out}: what it lacks is downloaded, 40 MB at the first time")
        built = build_wheelhouse(profile, named_image(profile, system), out)
    facts = {
        "folder": str(built.folder), "wheels": built.wheels, "size_bytes": built.size_bytes,
        "python": built.python, "machine": built.machine,
    }  # fmt: skip
    if output == "json":
        print(json.dumps(facts))
    else:
        print(
            f"{built.folder}: {built.wheels} wheels, {built.size_bytes / 1e6:.1f} MB, for Python "
            f"{built.python} on {built.machine}"
        )


def _secret(path: Path | None, option: str) -> str:
    """The first line of a file or of stdin; never of the command line, which `ps` shows."""
    if path is None:
        return ""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"{option} {path}: not a text file", 3)
    return text.split("\n", 1)[0].rstrip("\r")


def _print(facts: dict[str, Any]) -> None:
    for name in ("where", "system", "first_boot"):
        if facts[name] is not None:
            print(f"{name:12} {facts[name]}")
    for change in facts["changes"]:
        print(f"{_SHOWN[change['action']]} {change['name']}  {change['size_bytes']} bytes")
    for command in facts["then"]:
        print(f"then: {command}")
    print("nothing written: a dry run" if facts["dry_run"] else facts["outcome"])
