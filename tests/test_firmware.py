"""The service unit that boards install."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from musplit.cli import main as command_line

UNIT = Path(__file__).resolve().parent.parent / "firmware_profiles" / "musplit-device.service"


def test_every_option_in_the_start_line_exists():
    start = re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)[1]
    known = {option for p in command_line.commands["device"].params for option in p.opts}
    assert set(re.findall(r"--[a-z-]+", start)) <= known


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit_without_a_word(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/musplit/bin/musplit", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    # An unknown key is only a warning on stderr, with exit code 0.
    assert (done.returncode, done.stderr) == (0, "")
