"""External meters that write lines: a CSV file that grows, a TCP port, a serial port, stdin.

Their readings may come faster or slower than the sampler asks: what came since the last time is
integrated by the lines' own times, and handed on as one mean power.

A line of the line protocol is `WATTS`, or `SECONDS WATTS` with the meter's own clock; blanks,
comma, semicolon or tab between them. Other lines are left out.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_client.errors import MeterError
from edge_client.power.meter import PLAUSIBLE_W, Reading
from wire_protocol.energy import Origin

_MAX_LINE: Final = 4096
_CHUNK: Final = 1 << 16
_MOST_CHUNKS: Final = 64
_LATEST_S: Final = 1e15
_FIELDS: Final = re.compile(r"[\s,;]+")

Row = tuple[float | None, float]  # the meter's seconds, if it tells any, and watts


class LineMeter:
    """Bytes in, mean powers out. The source is a non-blocking file descriptor."""

    def __init__(
        self, handle: int, parse: Callable[[str], Row | None], origin: Origin, *,
        now_s: Callable[[], float] = time.monotonic, ends: bool = True,
    ) -> None:  # fmt: skip
        """`ends`: an end of file is the end of the meter, as of a connection."""
        self.origin = origin
        self._handle = handle
        self._parse = parse
        self._now_s = now_s
        self._ends = ends
        self._rest = b""
        self._last: tuple[float, float] | None = None  # the meter's seconds, and watts
        self._left_out = 0
        self._heard = False

    def read(self) -> Reading | None:
        """The mean power of the lines since the last call, at the time of this one."""
        self._receive()
        whole, found, self._rest = self._rest.rpartition(b"\n")
        if len(self._rest) > _MAX_LINE:
            self._rest = b""
            raise MeterError(f"{self.origin.driver}: a line longer than {_MAX_LINE} bytes")
        if not found:
            return None
        rows = [self._parse(line) for line in whole.decode("utf-8", "replace").splitlines()]
        power_w = self._mean([row for row in rows if row is not None])
        self._left_out += rows.count(None)
        if power_w is None and not self._heard:
            raise MeterError(
                f"{self.origin.driver}: {self._left_out} lines, none of them a reading; "
                "docs/energy.md has the formats"
            )
        return None if power_w is None else Reading(self._now_s(), power_w)

    def _mean(self, rows: list[Row]) -> float | None:
        """Of the trapezoid by the meter's times where it tells them, else of the lines."""
        if not rows:
            return None
        joules = seconds = 0.0
        for at_s, power_w in rows:
            if at_s is None:
                continue
            if self._last is not None and at_s > self._last[0]:
                joules += (at_s - self._last[0]) * (power_w + self._last[1]) / 2
                seconds += at_s - self._last[0]
            self._last = at_s, power_w
        self._heard = True
        return joules / seconds if seconds else sum(row[1] for row in rows) / len(rows)

    def close(self) -> None:
        """Close the source."""
        os.close(self._handle)

    def _receive(self) -> None:
        for _ in range(_MOST_CHUNKS):
            try:
                octets = os.read(self._handle, _CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                raise MeterError(f"{self.origin.driver}: {error.strerror}") from error
            self._rest += octets
            if not octets:
                if self._ends:
                    raise MeterError(f"{self.origin.driver}: the meter closed the connection")
                return


def parse_line(line: str) -> Row | None:
    """A line of the line protocol; None when it is not one."""
    fields = [field for field in _FIELDS.split(line.strip()[:_MAX_LINE]) if field]
    if not 1 <= len(fields) <= 2:
        return None
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        return None
    if not (abs(numbers[0]) < _LATEST_S and abs(numbers[-1]) < PLAUSIBLE_W):  # nan is not, either
        return None
    return (None if len(numbers) == 1 else numbers[0], numbers[-1])


def open_growing(path: Path) -> tuple[int, str]:
    """A file that somebody appends to: a descriptor at its end, and its first line."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise MeterError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header, found, _ = os.read(handle, _MAX_LINE).partition(b"\n")
        os.lseek(handle, 0, os.SEEK_END)
    except OSError as error:  # a folder, a pipe
        os.close(handle)
        raise MeterError(f"{path}: is no file that grows ({error.strerror})") from error
    if not found:
        os.close(handle)
        raise MeterError(f"{path}: no header line yet; start the meter's recording first")
    return handle, header.decode("utf-8", "replace")
