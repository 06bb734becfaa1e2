"""The offline wheelhouse: refused when anything in it is not what its hashes say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.metadata import Distribution

import pytest
from click.testing import CliRunner
from flash_support import make_wheelhouse

from firmware_profiles.catalogue import load_profile
from firmware_profiles.errors import WheelhouseError
from firmware_profiles.provision.own_wheel import _repack
from firmware_profiles.provision.wheelhouse import (
    _requirements,
    board_python,
    build_wheelhouse,
    check_wheelhouse,
)
from musplit.cli import main

LIMIT_BYTES = 50_000_000


def test_a_whole_wheelhouse_is_taken(tmp_path):
    found = check_wheelhouse(make_wheelhouse(tmp_path / "w", "3.11"))
    assert (found.wheels, found.python, found.machine) == (1, "3.11", "aarch64")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: (w / "demo-1.0-py3-none-any.whl").write_bytes(b"evil"), "is damaged"),
        (lambda w: (w / "requirements.txt").unlink(), "requirements.txt is missing"),
        (lambda w: (w / "more-1.0-py3-none-any.whl").write_bytes(b"x"), "or too many"),
        (lambda w: (w / "SHA256SUMS").unlink(), "no wheelhouse"),
        (lambda w: (w / "SHA256SUMS").write_text("nonsense\n"), "no wheelhouse"),
    ],
)
def test_a_changed_wheelhouse_is_refused_with_the_remedy(tmp_path, change, reason):
    folder = make_wheelhouse(tmp_path / "w", "3.11")
    change(folder)
    with pytest.raises(WheelhouseError, match=reason) as caught:
        check_wheelhouse(folder)
    assert "musplit wheelhouse" in str(caught.value)


def test_requirements_of_extras_do_not_count_and_conditions_are_told():
    lines = ["numpy>=2", "torch; extra == 'server'", "Backports.Zstd (>=1) ; python_version<'3.14'"]
    assert _requirements(lines) == [("numpy", False), ("backports-zstd", True)]


def test_a_board_whose_python_is_too_old_gets_wheels_for_the_oldest_that_will_do():
    image = load_profile("rpi-4b").images[0]
    assert board_python(image) == image.python == "3.11"
    jetpack = load_profile("jetson-orin-nano").images[0]
    assert (jetpack.python, board_python(jetpack)) == ("3.10", "3.11")


def test_an_installation_becomes_a_wheel_again_with_equal_bytes(tmp_path):
    """For laptops that have musplit from a wheel: there is no source tree to build from."""
    site = tmp_path / "site"
    info = site / "musplit-9.9.dist-info"
    (site / "demo_musplit").mkdir(parents=True)
    info.mkdir()
    (site / "demo_musplit" / "__init__.py").write_text("VALUE = 7\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: musplit\nVersion: 9.9\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(
        "demo_musplit/__init__.py,,\ndemo_musplit/__pycache__/__init__.cpython-311.pyc,,\n"
        "../../../bin/musplit,,\nmusplit-9.9.dist-info/METADATA,,\nmusplit-9.9.dist-info/WHEEL,,\n"
        "musplit-9.9.dist-info/INSTALLER,,\nmusplit-9.9.dist-info/RECORD,,\n"
    )
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        wheel = _repack(Distribution.at(info), tmp_path / name)
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
         "--target", str(tmp_path / "again"), str(wheel)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "demo_musplit" / "__init__.py").read_text() == "VALUE = 7\n"
    assert not (tmp_path / "again" / "demo_musplit" / "bin").exists()


@pytest.mark.network
@pytest.mark.timeout(900)
@pytest.mark.parametrize("system", ["bookworm", "trixie"])
def test_the_wheelhouse_of_a_raspberry_pi_fits_into_fifty_megabytes(tmp_path, system):
    out = tmp_path / "wheels"
    command = ["wheelhouse", "--profile", "rpi-4b", "--system", system, "--out", str(out)]
    done = CliRunner().invoke(main, [*command, "--format", "json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    sys.stdout.write(f"\n{system}: {facts['size_bytes'] / 1e6:.1f} MB, {facts['wheels']} wheels\n")
    assert facts["size_bytes"] <= LIMIT_BYTES
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert CliRunner().invoke(main, command).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_damaged_or_half_written_wheelhouse_is_built_again(tmp_path, monkeypatch):
    """As the remedy says; downloads left out."""
    profile, folder = load_profile("rpi-4b"), tmp_path / "w"
    module = "firmware_profiles.provision.wheelhouse."
    monkeypatch.setattr(f"{module}own_wheel", lambda scratch: scratch)
    monkeypatch.setattr(f"{module}_pins", lambda *_: {})
    built = []

    def download(_profile, _image, _pins, scratch):
        built.append(scratch)
        (scratch / "demo-1.0-py3-none-any.whl").write_bytes(b"wheel")

    monkeypatch.setattr(f"{module}_download", download)
    build_wheelhouse(profile, profile.images[0], folder)
    build_wheelhouse(profile, profile.images[0], folder)
    assert len(built) == 1
    (folder / "demo-1.0-py3-none-any.whl").write_bytes(b"evil")
    (tmp_path / "w.new").mkdir()  # as of a run that was killed
    assert build_wheelhouse(profile, profile.images[0], folder).wheels == 1
    assert len(built) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_folder_with_other_files_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    profile = load_profile("rpi-4b")
    with pytest.raises(WheelhouseError, match="folder of its own"):
        build_wheelhouse(profile, profile.images[0], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
