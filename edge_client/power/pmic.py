"""The power management chip of a Raspberry Pi 5, by `vcgencmd pmic_read_adc`.

The rails' sum leaves out what hangs on 5 V directly (USB, fans) and the converters' losses. The
line below was fitted on one board and published; calibrate your own with a meter at the plug.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Final

from edge_client.errors import MeterError
from edge_client.power.meter import Reading
from wire_protocol.energy import Origin

# P = SLOPE * sum + OFFSET_W: a published fit of one single board.
SLOPE: Final = 1.1451
OFFSET_W: Final = 0.5879
COMMAND: Final = ("vcgencmd", "pmic_read_adc")
_LINE: Final = re.compile(
    r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]\s*$", re.MULTILINE
)
_TIMEOUT_S: Final = 2.0


class PmicMeter:
    """The board's power, estimated from its twelve rails."""

    def __init__(
        self, *, rate_hz: float, command: Sequence[str] = COMMAND,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Raises MeterError when this is no Raspberry Pi 5."""
        self._command = list(command)
        self._now_s = now_s
        rails = parse_rails(self._ask())
        self.origin = Origin(
            meter="pmic",
            driver=f"vcgencmd pmic_read_adc: {len(rails)} rails; 1.1451 * sum + 0.5879 W",
            boundary="board-dc",
            reading="instant",
            rate_hz=rate_hz,
            resolution_w=None,
            uncertainty_relative=0.1,
            uncertainty_source="assumed: the line is a published fit of one single board",
        )

    def read(self) -> Reading:
        """The power now. Raises MeterError."""
        begin_s = self._now_s()
        rails = parse_rails(self._ask())
        rails_w = sum(rails.values())
        power_w = SLOPE * rails_w + OFFSET_W if rails_w > 0 else 0.0
        return Reading((begin_s + self._now_s()) / 2, power_w)

    def close(self) -> None:
        """Nothing is held open."""

    def _ask(self) -> str:
        try:
            done = subprocess.run(
                self._command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
                close_fds=False,  # without it the process is started several times faster
            )  # fmt: skip
        except FileNotFoundError as error:
            raise MeterError(f"pmic: {self._command[0]} is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise MeterError(f"pmic: {self._command[0]} did not answer in 2 s") from error
        except OSError as error:
            raise MeterError(f"pmic: {self._command[0]}: {error.strerror}") from error
        return done.stdout


def parse_rails(text: str) -> dict[str, float]:
    """Watts of every rail that has a current and a voltage. Raises MeterError when none has."""
    found: dict[str, dict[str, float]] = {}
    for rail, kind, value in _LINE.findall(text):
        found.setdefault(rail, {})[kind] = float(value)
    rails = {rail: both["A"] * both["V"] for rail, both in found.items() if len(both) == 2}
    if not rails:
        said = " ".join(text.split())[:80] or "nothing"
        raise MeterError(f"pmic: not a Raspberry Pi 5? pmic_read_adc said: {said}")
    return rails
