"""What the firmware of a Raspberry Pi tells of its power supply and its temperature."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

_FILES: Final = "sys/devices/platform/soc*/*firmware/get_throttled"
_TIMEOUT_S: Final = 5.0


def throttled_bits(root: Path) -> int | None:
    """The flags of `vcgencmd get_throttled`: bits 0-3 hold now, 16-19 since boot.

    From the kernel's file, else, where `root` is this machine, by vcgencmd; None without either.
    """
    for path in sorted(root.glob(_FILES)):
        try:
            return int(path.read_text(encoding="ascii"), 16)
        except (OSError, ValueError):
            continue
    vcgencmd = shutil.which("vcgencmd") if root == Path("/") else None
    if vcgencmd is None:
        return None
    try:
        done = subprocess.run(
            [vcgencmd, "get_throttled"], check=True, capture_output=True, text=True,
            timeout=_TIMEOUT_S,
        )  # fmt: skip
        return int(done.stdout.strip().partition("=")[2], 16)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
