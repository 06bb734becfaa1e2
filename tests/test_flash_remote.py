"""`musplit flash` without a card: over SSH, and as an overlay for a Jetson's root file system."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest
from flash_support import TOKEN, Desk

from firmware_profiles.provision import remote, seed

# Stands for ssh and the board: notes its arguments, runs the command here in a folder of its own.
FAKE_SSH = """#!/bin/sh
printf '%s\\n' "$*" >>"$FAKE/arguments"
while [ "$1" != "--" ]; do shift; done
cd "$FAKE/home" && exec sh -c "$3"
"""
FAKE_SUDO = """#!/bin/sh
echo "$@" >>"$FAKE/sudo"
[ "$1" = -n ] || exit 1
echo "sudo: a password is required" >&2
exit 1
"""
JETSON = """
name = "jetson-orin-nano"
title = "Jetson Orin Nano"
kind = "jetson"
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A desk beside which there is an `ssh` that leads to a folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "home").mkdir()
    (programs / "ssh").write_text(FAKE_SSH)
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    return Desk(tmp_path)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """The board's own programs: its installer is replaced by one that only notes what it got."""
    make = seed.make_seed

    def with_fake_installer(order, wheelhouse):
        made = make(order, wheelhouse)
        script = f'#!/bin/sh\nls "$(dirname "$0")" >>{tmp_path}/installed\n'
        files = {**made.files, "musplit/install.sh": script.encode()}
        return made._replace(files=files)

    monkeypatch.setattr("firmware_profiles.provision.flashing.make_seed", with_fake_installer)
    monkeypatch.setattr(remote, "_DONE", str(tmp_path / "done.json"))
    monkeypatch.setattr(remote, "_CURRENT", f"cat {tmp_path}/done.json 2>/dev/null || true")
    monkeypatch.setattr(
        remote,
        "_INSTALL",
        remote._INSTALL.replace("/var/lib/musplit-seed.json", f"{tmp_path}/done.json"),
    )
    return tmp_path


def test_the_installer_runs_once_over_ssh_and_nothing_is_left_behind(desk, board):
    options = ("--ssh", "pi@board", *desk.secure())
    assert desk.flashed(*options)["outcome"] == "installed"
    assert set((board / "installed").read_text().split()) >= {"enrol.token", "wheelhouse"}
    assert json.loads((board / "done.json").read_text())["device_id"] == "pi-1"
    assert list((board / "home").iterdir()) == []
    again = desk.flashed(*options)
    assert again["outcome"].startswith("nothing to do")
    assert (board / "installed").read_text().count("install.sh") == 1


def test_an_installer_that_fails_leaves_no_secret_behind(desk, board, monkeypatch):
    monkeypatch.setattr(remote, "_INSTALL", remote._INSTALL.replace("install -m 644", "false"))
    assert desk.flash("--ssh", "pi@board", *desk.secure()).exit_code == 3
    assert (board / "installed").exists()
    assert list((board / "home").iterdir()) == []


def test_neither_token_nor_settings_are_in_the_arguments_of_ssh(desk, board):
    desk.flashed("--ssh", "pi@board", *desk.secure())
    arguments = (board / "arguments").read_text()
    assert TOKEN not in arguments
    assert "192.168.1.10" not in arguments


def test_a_dry_run_over_ssh_only_asks_what_is_there(desk, board):
    facts = desk.flashed("--ssh", "pi@board", *desk.secure(), "--dry-run")
    assert facts["outcome"] is None
    assert not (board / "installed").exists()


@pytest.mark.usefixtures("board")
def test_a_board_of_another_device_is_refused(desk):
    desk.flashed("--ssh", "pi@board", "--insecure")
    done = desk.flash("--ssh", "pi@board", "--insecure", device_id="pi-2")
    assert done.exit_code == 3
    assert "was flashed as 'pi-1'" in done.stderr


def test_a_failure_on_the_board_is_one_line_with_its_reason(desk, tmp_path):
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\necho 'ssh: connect: refused' >&2\nexit 255\n")
    done = desk.flash("--ssh", "pi@board", "--insecure")
    assert done.exit_code == 3
    assert "ssh: connect: refused" in done.stderr.splitlines()[-1]


def test_sudo_that_wants_a_password_says_what_to_do(desk, board):
    for name, script in (("sudo", FAKE_SUDO), ("id", "#!/bin/sh\necho 1000\n")):
        (board / "bin" / name).write_text(script)
        (board / "bin" / name).chmod(0o755)
    done = desk.flash("--ssh", "pi@board", "--insecure")
    assert done.exit_code == 3
    assert "sudoers" in done.stderr


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b"])
def test_a_host_that_ssh_would_read_as_something_else_is_refused(desk, host):
    done = desk.flash("--ssh", host, "--insecure")
    assert done.exit_code == 3
    assert "USER@HOST" in done.stderr


def _jetson(desk):
    text = desk.profile.read_text()
    head, rest = text.split("memory_mb", 1)
    assert "raspberry-pi" in head
    text = (
        JETSON
        + "memory_mb"
        + rest.replace('first_boot = "firstrun"', 'first_boot = "jetson-overlay"')
    )
    desk.profile.write_text(text)


def test_a_jetson_gets_a_tar_that_installs_at_its_first_boot(desk, tmp_path):
    _jetson(desk)
    tar = tmp_path / "overlay.tar"
    options = ("--overlay", str(tar), *desk.secure())
    facts = desk.flashed(*options)
    assert "Linux_for_Tegra/rootfs" in facts["then"][0]
    assert "jetson-orin-nano-devkit" in facts["then"][1]
    assert tar.stat().st_mode & 0o777 == 0o600
    data = tar.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name: member for member in archive}
        unit = archive.extractfile("etc/systemd/system/musplit-install.service").read().decode()
    assert members["opt/musplit-seed/enrol.token"].mode == 0o600
    assert members["opt/musplit-seed"].mode == 0o700
    assert {(m.uid, m.gid, m.mtime) for m in members.values()} == {(0, 0, 0)}
    wanted = members["etc/systemd/system/multi-user.target.wants/musplit-install.service"]
    assert wanted.linkname == "/etc/systemd/system/musplit-install.service"
    assert "/opt/musplit-seed/install.sh" in unit
    assert "ExecStartPost=/bin/rm -rf /opt/musplit-seed\n" in unit
    assert desk.flashed(*options)["outcome"].startswith("nothing to do")
    assert tar.read_bytes() == data


def test_an_overlay_is_for_jetson_boards_only(desk, tmp_path):
    done = desk.flash("--overlay", str(tmp_path / "x.tar"), "--insecure")
    assert done.exit_code == 3
    assert "no Jetson" in done.stderr
