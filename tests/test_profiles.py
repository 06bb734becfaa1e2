"""Board profiles: those that ship with musplit, a user's own, and `musplit profiles`."""

from __future__ import annotations

import json
import os
from importlib.resources import files

import pytest
from click.testing import CliRunner

from firmware_profiles.catalogue import as_builtins, catalogue, load_profile, parse_profile
from firmware_profiles.errors import ProfileError
from firmware_profiles.schema import Figure, Watts
from musplit.cli import main

BOARDS = {
    "rpi-zero-2w", "rpi-3b-plus", "rpi-4b", "rpi-5", "rpi-cm4", "jetson-nano", "jetson-xavier-nx",
    "jetson-orin-nano", "jetson-agx-orin", "laptop",
}  # fmt: skip
RPI_4B = files("firmware_profiles").joinpath("boards/rpi-4b.toml").read_text(encoding="utf-8")


def run(*arguments):
    return CliRunner().invoke(main, ["profiles", *arguments])


def test_every_board_is_there():
    assert {profile.name for profile in catalogue()} == BOARDS


@pytest.mark.parametrize("profile", catalogue(), ids=lambda profile: profile.name)
class TestEveryBoard:
    def test_its_file_has_its_name(self, profile):
        path = files("firmware_profiles").joinpath(f"boards/{profile.name}.toml")
        assert parse_profile(path.read_text(encoding="utf-8"), profile.name) == profile

    def test_every_number_has_a_source(self, profile):
        link, power = profile.link, profile.power
        numbers = [
            profile.cpu.clock_hz, link.up_bits_s, link.down_bits_s, link.latency_s, power.idle,
            power.load, profile.speed.factor,
        ]  # fmt: skip
        for number in numbers:
            assert isinstance(number, Figure | Watts)
            assert len(number.source) > 10
            assert number.confidence in {"vendor", "published", "assumed"}  # nobody measured here

    def test_unsupported_images_say_why(self, profile):
        for image in profile.images:
            assert len(image.remedy) > 20
            if image.supported and profile.kind == "raspberry-pi":
                assert image.python >= "3.11"
                assert image.first_boot != "none"

    def test_glibc_below_the_wheels_is_not_supported(self, profile):
        for image in profile.images:
            if tuple(map(int, image.glibc.split("."))) < (2, 28):
                assert not image.supported

    def test_the_model_stands_last(self, profile):
        assert profile.power.sensors[-1] == "model"

    def test_old_cores_name_the_crash(self, profile):
        if profile.cpu.qemu_cpu in {"cortex-a53", "cortex-a72"}:
            assert "1.21.0" in {crash.version for crash in profile.runtime.crashes}


def test_a_size_of_memory():
    assert load_profile("rpi-4b:4096").memory_mb == [4096]
    assert load_profile("rpi-4b").memory_mb == [1024, 2048, 4096, 8192]
    with pytest.raises(ProfileError, match=r"sold with 1024, 2048, 4096, 8192 MB"):
        load_profile("rpi-4b:512")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ProfileError, match=r"'rpi-6': unknown; write one of jetson-agx-orin.*path"):
        load_profile("rpi-6")


def test_an_own_profile_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(RPI_4B.replace('name = "rpi-4b"', 'name = "pi-of-lab-3"'), encoding="utf-8")
    assert load_profile(str(path)).name == "pi-of-lab-3"
    assert load_profile(f"{path}:2048").memory_mb == [2048]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value_w = 6.4", "value_w = 'much'", r"power\.load\.value_w: Expected `float`"),
        ("value_w = 6.4", "value_w = 1.0", r"power\.load\.value_w: 1\.0 W is below"),
        ("cores = 4", "cores = 0", r"cpu\.cores: Expected `int` >= 1"),
        ("cores = 4", "cores = 4\ncoers = 4", r"cpu: .*unknown field `coers`"),
        ("threads = 4\n", "threads = -1\n", r"runtime\.threads"),
        ('onnxruntime = "1.24.4"', 'onnxruntime = "1.21.0"', r"runtime\.onnxruntime.*crashes"),
        ("memory_mb = [1024,", "memory_mb = [2048,", r"memory_mb: lists a size twice"),
        ('"ina226",', '"ina219",', r"power\.sensors: names a meter twice"),
        ('"plug-mqtt", "model"', '"model", "plug-mqtt"', r"power\.sensors: .*write model last"),
        ('name = "rpi-4b"', 'name = "Pi 4"', r"name: Expected `str` matching"),
        ('boundary = "board-dc"', 'boundary = "somewhere"', r"power\.idle\.boundary: Invalid"),
        ('[power.load]\nvalue_w = 6.4\nboundary = "board-dc"',
         '[power.load]\nvalue_w = 6.4\nboundary = "wall-ac"', r"power\.load\.boundary: wall-ac"),
        ('title = "Raspberry Pi 4 Model B"', "", r"missing required field `title`"),
        ("[cpu]", "[cpu", r"not TOML"),
        ("cores = 4", f"cores = {'9' * 5000}", r"not TOML: Exceeds"),
        ("cores = 4", f"cores = {'[' * 5000}", r"not TOML: .*recursion"),
        ('name = "rpi-4b"', 'name = "rpi-4b\\n"', r"name: Expected `str` matching"),
        ('glibc = "2.36"', 'glibc = "2"', r"glibc: Expected `str` matching"),
        ('title = "Raspberry Pi 4 Model B"', f"title = '{'x' * (1 << 20)}'", r"larger than 1 MiB"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path, old, new, message):
    assert old in RPI_4B
    path = tmp_path / "mine.toml"
    path.write_text(RPI_4B.replace(old, new), encoding="utf-8")
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe.toml"
    os.mkfifo(pipe)
    with pytest.raises(ProfileError, match=r"is no file"):
        load_profile(str(pipe))


def test_a_calibrated_step():
    entry = (
        f'\n[[speed.calibrated]]\ngraph = "{"a" * 64}"\ncut = "fc1"\nbatch = 32\nthreads = 4\n'
        'directions = 2\nstep_s = 0.5\nsource = "evidence"\n'
    )
    found = parse_profile(RPI_4B + entry, "mine").speed.calibrated
    assert [each.step_s for each in found] == [0.5]


def test_list_and_show():
    listed = run("list")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in BOARDS)
    assert {profile["name"] for profile in json.loads(run("list", "--format", "json").stdout)} == (
        BOARDS
    )
    shown = run("show", "rpi-4b:4096").stdout
    assert "power.idle = 2.7  (published, board-dc: pidramble.com" in shown
    assert "memory_mb = 4096\n" in shown
    assert json.loads(run("show", "rpi-5", "--format", "json").stdout) == as_builtins(
        load_profile("rpi-5")
    )
    assert run("show", "rpi-6").exit_code == 3


def test_check(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(RPI_4B, encoding="utf-8")
    bad.write_text(RPI_4B.replace("cores = 4", "cores = 4.5"), encoding="utf-8")
    assert run("check", str(good)).exit_code == 0
    both = run("check", str(good), str(bad))
    assert both.exit_code == 3
    assert both.stderr.count("\n") == 1
    assert f"{bad}: cpu.cores" in both.stderr
    findings = json.loads(
        run("check", str(good), str(tmp_path / "none.toml"), "--format", "json").stdout
    )
    assert [finding["profile"] for finding in findings] == ["rpi-4b", None]
    assert "cannot be read" in findings[1]["error"]
