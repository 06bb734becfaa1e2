"""`musplit flash` on cards and images: what lands there, what is refused, what a rerun changes."""

from __future__ import annotations

import json
import subprocess
import tomllib

import pytest
from click.testing import CliRunner
from flash_support import (
    KEY,
    OFFSET,
    PARTITIONS,
    PASSPHRASE,
    SSID,
    TOKEN,
    Desk,
    make_folder,
    make_image,
    needs_fat,
    unpack,
)

from firmware_profiles.catalogue import catalogue, load_profile
from firmware_profiles.errors import FlashError
from firmware_profiles.provision.boot import FolderBoot
from firmware_profiles.provision.detect import detect
from musplit.cli import main

PYTHONS = {"bookworm": "3.11", "trixie": "3.13", "ubuntu-24.04": "3.12", "preseed": "3.13"}
OWN_FILES = {
    "bookworm": {"firstrun.sh"},
    "trixie": {"user-data", "meta-data", "network-config"},
    "ubuntu-24.04": {"user-data", "meta-data", "network-config"},
    "preseed": {"rpi-preseed.toml"},
}
SEED = {
    "install.sh", "musplit-device.service", "device.env", "ca.pem", "signer.pub", "enrol.token",
    "shard.npz", "flash.json", "wheelhouse",
}  # fmt: skip
# WPA's key of PASSPHRASE and SSID, as wpa_passphrase computes it.
PSK_LENGTH = 64


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@needs_fat
@pytest.mark.parametrize("name", PARTITIONS)
def test_every_file_lands_in_the_image_and_a_second_run_changes_no_byte(desk, tmp_path, name):
    image = make_image(tmp_path / "card.img", PARTITIONS[name], 16 if name == "preseed" else 32)
    options = ("--image", str(image), *desk.secure(), *desk.network())
    facts = desk.flashed(*options, python=PYTHONS[name])
    assert facts["outcome"] == "written"
    assert {change["action"] for change in facts["changes"]} <= {"create", "replace"}
    there = unpack(image, tmp_path / "files")
    assert {path.name for path in (there / "musplit").iterdir()} == SEED
    assert {path.name for path in there.iterdir()} >= OWN_FILES[name]
    for kept in set(PARTITIONS[name]) - OWN_FILES[name] - {"cmdline.txt"}:
        assert (there / kept).read_bytes() == PARTITIONS[name][kept]
    written = image.read_bytes()
    again = desk.flashed(*options, python=PYTHONS[name])
    assert {change["action"] for change in again["changes"]} == {"keep"}
    assert image.read_bytes() == written
    (tmp_path / "partition").write_bytes(written[OFFSET:])
    checked = subprocess.run(
        ["fsck.fat", "-n", tmp_path / "partition"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_mounted_card_gets_the_same_bytes_and_keeps_its_times(desk, tmp_path, name):
    card = make_folder(tmp_path / "card", PARTITIONS[name])
    options = ("--boot-dir", str(card), *desk.secure(), *desk.network())
    desk.flashed(*options, python=PYTHONS[name])
    before = {path: path.stat().st_mtime_ns for path in card.rglob("*")}
    assert desk.flashed(*options, python=PYTHONS[name])["outcome"].startswith("nothing to do")
    assert {path: path.stat().st_mtime_ns for path in card.rglob("*")} == before
    everything = b"".join(path.read_bytes() for path in card.rglob("*") if path.is_file())
    assert PASSPHRASE.encode() not in everything
    assert everything.count(TOKEN.encode()) == 1
    assert everything.count(KEY.encode()) == 1


def test_the_kernel_command_line_keeps_its_words_and_gets_the_first_boot(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    desk.flashed("--boot-dir", str(card), "--insecure")
    words = (card / "cmdline.txt").read_text().split()
    assert words[:-3] == PARTITIONS["bookworm"]["cmdline.txt"].decode().split()
    assert words[-3:] == [
        "systemd.run=/boot/firmware/firstrun.sh", "systemd.run_success_action=reboot",
        "systemd.unit=kernel-command-line.target",
    ]  # fmt: skip


def test_a_changed_order_is_a_new_instance_for_cloud_init(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["trixie"])
    seen = []
    for broker in ("10.0.0.1", "10.0.0.1", "10.0.0.2"):
        desk.flashed("--boot-dir", str(card), "--insecure", "--broker", broker, python="3.13")
        instance = (card / "meta-data").read_text().splitlines()[0].split()[1]
        assert (card / "cmdline.txt").read_text().count("ds=nocloud") == 1
        assert f"ds=nocloud;i={instance}" in (card / "cmdline.txt").read_text()
        seen.append(instance)
    assert seen[0] == seen[1] != seen[2]


def test_wheels_of_an_older_release_are_removed(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    options = ("--boot-dir", str(card), "--insecure")
    desk.flashed(*options)
    (card / "musplit" / "wheelhouse" / "old-1.0-py3-none-any.whl").write_bytes(b"old")
    facts = desk.flashed(*options)
    assert [c["action"] for c in facts["changes"] if "old-1.0" in c["name"]] == ["remove"]
    assert not (card / "musplit" / "wheelhouse" / "old-1.0-py3-none-any.whl").exists()


def test_a_dry_run_shows_every_file_and_no_secret_and_writes_nothing(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    before = {path.name for path in card.iterdir()}
    options = ("--boot-dir", str(card), *desk.secure(), *desk.network(), "--dry-run")
    text = desk.flash(*options)
    facts = desk.flashed(*options)
    assert {path.name for path in card.iterdir()} == before
    assert facts["dry_run"] is True
    assert facts["outcome"] is None
    names = {change["name"] for change in facts["changes"]}
    assert {"firstrun.sh", "cmdline.txt", "musplit/enrol.token"} <= names
    assert all(name in text.output for name in names)
    for secret in (PASSPHRASE, TOKEN, TOKEN.partition(":")[2]):
        assert secret not in text.output + json.dumps(facts)


def test_secrets_come_from_stdin_too(desk, tmp_path):
    """Never from the command line, which every user of the machine can read."""
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    done = CliRunner().invoke(
        main,
        ["flash", "--profile", str(desk.profile), "--device-id", "pi-1", "--broker", "lab.local",
         "--wheelhouse", str(desk.wheels("3.11")), "--boot-dir", str(card), "--insecure",
         "--wifi-ssid", "lab", "--wifi-country", "DE", "--wifi-passphrase-file", "-"],
        input=f"{PASSPHRASE}\n",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    line = next(s for s in (card / "firstrun.sh").read_text().splitlines() if "set_wlan" in s)
    assert len(line.split()[3]) == PSK_LENGTH


def test_an_ssid_with_quotes_survives_every_format(desk, tmp_path):
    for name in ("trixie", "preseed"):
        card = make_folder(tmp_path / name, PARTITIONS[name])
        desk.flashed("--boot-dir", str(card), "--insecure", *desk.network(), python=PYTHONS[name])
    body = (tmp_path / "trixie" / "network-config").read_text().split("\n", 1)[1]
    wlan = json.loads(body)["network"]["wifis"]["wlan0"]
    assert list(wlan["access-points"]) == [SSID]
    preseed = tomllib.loads((tmp_path / "preseed" / "rpi-preseed.toml").read_text())
    assert preseed["wlan"]["ssid"] == SSID
    assert preseed["wlan"]["password"] == wlan["access-points"][SSID]["password"]


def _changed(name: str, **files: bytes | None) -> dict[str, bytes]:
    """A partition with other files; None removes one. `_` stands for the dot of a suffix."""
    content = dict(PARTITIONS[name])
    for key, data in files.items():
        content.pop(key.replace("_", ".", 1), None)
        if data is not None:
            content[key.replace("_", ".", 1)] = data
    return content


REFUSED = {
    "32-bit kernel": (_changed("bookworm", config_txt=b"arm_64bit=0\n"), "arm_64bit=0"),
    "32-bit programs": (_changed("bookworm", kernel7l_img=b"x"), "marks a 32-bit system"),
    "no kernel": (_changed("bookworm", kernel8_img=None), "no 64-bit kernel"),
    "a zImage": (
        _changed("bookworm", kernel8_img=b"\0" * 0x24 + b"\x18\x28\x6f\x01" + b"\0" * 64),
        "its kernel is a 32-bit one",
    ),
    "another board": (
        {k: v for k, v in PARTITIONS["bookworm"].items() if not k.endswith(".dtb")},
        "not an image for Raspberry Pi 4",
    ),
    "no boot partition": ({"holiday.jpg": b"x"}, "no boot partition of a Raspberry Pi"),
    "the imager's script": (_changed("bookworm", firstrun_sh=b"#!/bin/sh\n"), "customised already"),
    "custom.toml": (_changed("bookworm", custom_toml=b"[system]\n"), "customised already"),
    "the imager's instance": (
        _changed("trixie", cmdline_txt=b"root=x ds=nocloud;i=rpi-imager-1\n"),
        "customised already",
    ),
    "the imager's preseed": (
        {**PARTITIONS["preseed"], "rpi-preseed.toml": b'config_version = "1.1"\n'},
        "customised already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_card_is_refused_with_the_reason_and_left_alone(desk, tmp_path, case):
    content, reason = REFUSED[case]
    card = make_folder(tmp_path / "card", content)
    done = desk.flash("--boot-dir", str(card), "--insecure")
    assert done.exit_code == 3
    assert reason in done.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in card.iterdir()} == content


@needs_fat
def test_a_partition_without_room_is_refused_and_left_alone(desk, tmp_path):
    image = make_image(tmp_path / "card.img", PARTITIONS["bookworm"], 16, size_mb=10)
    (tmp_path / "shard.npz").write_bytes(b"x" * 11_000_000)
    before = image.read_bytes()
    for dry_run in ([], ["--dry-run"]):
        done = desk.flash("--image", str(image), *desk.secure(), *dry_run)
        assert done.exit_code == 3
        assert "has no room: 11." in done.stderr
    assert image.read_bytes() == before


def test_a_card_of_another_device_is_refused(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    desk.flashed("--boot-dir", str(card), "--insecure")
    done = desk.flash("--boot-dir", str(card), "--insecure", device_id="pi-2")
    assert done.exit_code == 3
    assert "was flashed as 'pi-1'" in done.stderr


FRESH = {
    "bookworm": PARTITIONS["bookworm"],
    "trixie": PARTITIONS["trixie"],
    "trixie-firstrun": _changed(
        "bookworm", cmdline_txt=b"root=x resize\n", issue_txt=b"reference 2025-10-01\n"
    ),
    "trixie-preseed": _changed(
        "bookworm", cmdline_txt=b"root=x resize\n", issue_txt=b"reference 2026-08-03\n"
    ),
    "ubuntu-24.04": PARTITIONS["ubuntu-24.04"],
}
TREES = {"bcm2710-rpi-3-b-plus.dtb": b"", "bcm2710-rpi-zero-2-w.dtb": b"",
         "bcm2711-rpi-4-b.dtb": b"", "bcm2712-rpi-5-b.dtb": b""}  # fmt: skip


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("profile", [p.name for p in catalogue() if p.kind == "raspberry-pi"])
def test_the_system_of_a_fresh_card_is_found_out_for_every_board(tmp_path, name, profile):
    known = load_profile(profile)
    card = FolderBoot(make_folder(tmp_path / "card", {**FRESH[name], **TREES}))
    if name in {image.name for image in known.images if image.supported}:
        assert detect(card, known, None).image.name == name
    else:
        with pytest.raises(FlashError):
            detect(card, known, None)


def test_a_token_of_another_device_is_refused_and_not_shown(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    done = desk.flash("--boot-dir", str(card), *desk.secure(), device_id="pi-2")
    assert done.exit_code == 3
    assert "not a token for 'pi-2'" in done.stderr
    assert TOKEN.partition(":")[2] not in done.output


@pytest.mark.parametrize("option", ["--ca", "--signer"])
def test_a_private_key_of_the_lab_never_gets_onto_a_card(desk, tmp_path, option):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    key = tmp_path / "ca.key"
    key.write_text("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\n")
    done = desk.flash("--boot-dir", str(card), *desk.secure(), option, str(key))
    assert done.exit_code == 3
    assert f"{option} {key}: holds a private key" in done.stderr
    assert not (card / "musplit").exists()


@pytest.mark.parametrize(
    ("option", "reason"), [("--wifi-ssid", "printable bytes"), ("--ssh-key", "OpenSSH public key")]
)
def test_what_is_no_text_is_refused_in_one_line(desk, tmp_path, option, reason):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    (tmp_path / "binary.pub").write_bytes(b"ssh-ed25519 \xff\xfe")
    value = "lab\udcff" if option == "--wifi-ssid" else str(tmp_path / "binary.pub")
    done = desk.flash("--boot-dir", str(card), "--insecure", *desk.network(), option, value)
    assert done.exit_code == 3
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_release_that_is_not_supported_says_what_to_take(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["bookworm"])
    done = desk.flash("--boot-dir", str(card), "--insecure", "--system", "bullseye")
    assert done.exit_code == 3
    assert "Python 3.9 is too old" in done.stderr


def test_a_wheelhouse_for_another_python_is_refused(desk, tmp_path):
    card = make_folder(tmp_path / "card", PARTITIONS["trixie"])
    done = desk.flash("--boot-dir", str(card), "--insecure", python="3.11")
    assert done.exit_code == 3
    assert "Trixie has 3.13" in done.stderr


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xfd7zXZ\0" + b"\0" * 600, "unpack it first"),
        (b"\0" * 100, "no partition table"),
        (
            b"\0" * 450
            + b"\x0c"
            + b"\0" * 3
            + (1).to_bytes(4, "little") * 2
            + b"\0" * 48
            + b"\x55\xaa",
            "ends within its boot partition",
        ),
        (b"\0" * 510 + b"\x55\xaa", "no FAT partition"),
        (b"\0" * 450 + b"\xee" + b"\0" * 59 + b"\x55\xaa", "GPT"),
    ],
)
@needs_fat
def test_a_file_that_is_no_card_is_refused(desk, tmp_path, data, reason):
    image = tmp_path / "x.img"
    image.write_bytes(data)
    done = desk.flash("--image", str(image), "--insecure")
    assert done.exit_code == 3
    assert reason in done.stderr
    assert image.read_bytes() == data


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--insecure"], 2, "give one of --boot-dir"),
        (["--boot-dir", ".", "--image", "x", "--insecure"], 2, "give one of --boot-dir"),
        (["--boot-dir", "."], 2, "or type --insecure"),
        (["--boot-dir", ".", "--insecure", "--ca", "ca.pem"], 2, "or type --insecure"),
        (["--boot-dir", ".", "--ca", "ca.pem"], 2, "--token-file"),
        (["--boot-dir", ".", "--insecure", "--broker", "a b"], 3, "--broker"),
        (["--boot-dir", ".", "--insecure", "--broker", "lab:0"], 3, "--broker 'lab:0'"),
        (["--boot-dir", ".", "--insecure", "--broker", "[::1]:65536"], 3, "--broker"),
        (["--boot-dir", ".", "--insecure", "--device-id", "../x"], 3, "device id"),
        (["--boot-dir", "none", "--insecure"], 3, "no folder"),
    ],
)
def test_a_wrong_command_line_is_one_line(desk, options, code, reason):
    done = desk.flash(*options)
    assert done.exit_code == code
    assert reason in done.stderr
