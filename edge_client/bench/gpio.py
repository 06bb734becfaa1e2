"""A GPIO line that is high while a window is measured, for an external power analyser.

The kernel's character device, version 2 (linux/gpio.h, Linux 5.10 on): no library, no daemon.
SPEC   PIN         of the chip that has the header's pins (label pinctrl-..)
       CHIP:PIN    e.g. gpiochip4:17
       file:PATH   no line: `t_s,level` rows, for trying a set-up without a board
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from edge_client.errors import GpioError

_HEADER: Final = "t_s,level\n"
_CONSUMER: Final = b"musplit-bench"
_OUTPUT: Final = 1 << 3  # GPIO_V2_LINE_FLAG_OUTPUT
# struct gpiochip_info: name, label, lines.
_CHIP_INFO: Final = struct.Struct("=32s32sI")
# struct gpio_v2_line_request: offsets[64], consumer, config (flags, num_attrs, padding[5],
# attrs[10] of 24 bytes), num_lines, event_buffer_size, padding[5], fd.
_REQUEST: Final = struct.Struct("=64I32sQI20x240xII20xi")
_VALUES: Final = struct.Struct("=QQ")  # struct gpio_v2_line_values: bits, mask


def _ioctl_number(direction: int, number: int, size: int) -> int:
    """Linux's _IOC: 2 is read, 3 is read and write."""
    return direction << 30 | size << 16 | 0xB4 << 8 | number


GET_CHIP_INFO: Final = _ioctl_number(2, 0x01, _CHIP_INFO.size)
GET_LINE: Final = _ioctl_number(3, 0x07, _REQUEST.size)
SET_VALUES: Final = _ioctl_number(3, 0x0F, _VALUES.size)


class Edge(Protocol):
    """High from the beginning of a window to its end."""

    def set(self, *, high: bool) -> None:
        """Drive the line."""
        ...

    def close(self) -> None:
        """Low, and give the line back."""
        ...


class NoEdge:
    """Nothing is connected."""

    def set(self, *, high: bool) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class FileEdge:
    """Rows `t_s,level` of the monotonic clock."""

    def __init__(self, path: Path) -> None:
        """Goes on in a file of edges; GpioError for any other, which would be spoilt."""
        self._file = path.open("a+", buffering=1, encoding="utf-8", errors="replace")
        self._file.seek(0)
        there = self._file.readline(len(_HEADER))
        if there not in ("", _HEADER):
            self._file.close()
            raise GpioError(f"--gpio file:{path}: holds something else; give a new file")
        if not there:
            self._file.write(_HEADER)

    def set(self, *, high: bool) -> None:
        """Append a row."""
        self._file.write(f"{time.monotonic():.6f},{int(high)}\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LineEdge:
    """One output line of a chip."""

    def __init__(self, device: Path, pin: int) -> None:
        chip = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            asked = bytearray(line_request(pin))
            fcntl.ioctl(chip, GET_LINE, asked)
            self._line: int = _REQUEST.unpack(asked)[-1]
        finally:
            os.close(chip)

    def set(self, *, high: bool) -> None:
        """One system call."""
        fcntl.ioctl(self._line, SET_VALUES, line_values(high=high))

    def close(self) -> None:
        """Low, and released."""
        self.set(high=False)
        os.close(self._line)


class _Wanted(NamedTuple):
    chip: str  # empty: the header's
    pin: int


def open_edge(spec: str, root: Path = Path("/")) -> Edge:
    """What SPEC names; empty: nothing. Raises GpioError, one line."""
    if not spec:
        return NoEdge()
    try:
        if spec.startswith("file:"):
            return FileEdge(Path(spec.removeprefix("file:")))
        wanted = _parse(spec)
        device = root / "dev" / wanted.chip if wanted.chip else _header_chip(root)
        return LineEdge(device, wanted.pin)
    except OSError as error:
        raise GpioError(
            f"--gpio {spec}: {error.filename or 'the line'}: {error.strerror}; is the chip there, "
            "the pin free, and the user in group gpio?"
        ) from error


def line_request(pin: int) -> bytes:
    """The kernel's request for one output line, low."""
    return _REQUEST.pack(pin, *[0] * 63, _CONSUMER, _OUTPUT, 0, 1, 0, 0)


def line_values(*, high: bool) -> bytes:
    """The kernel's bits and mask of that one line."""
    return _VALUES.pack(int(high), 1)


def _parse(spec: str) -> _Wanted:
    chip, _, pin = spec.rpartition(":")
    if not pin.isdecimal() or int(pin) > 1023 or "/" in chip:
        raise GpioError(f"--gpio {spec}: write PIN, CHIP:PIN as in gpiochip4:17, or file:PATH")
    return _Wanted(chip, int(pin))


def _header_chip(root: Path) -> Path:
    devices = sorted((root / "dev").glob("gpiochip*"))
    for device in devices:
        chip = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            told = bytearray(_CHIP_INFO.size)
            fcntl.ioctl(chip, GET_CHIP_INFO, told)
        finally:
            os.close(chip)
        if _CHIP_INFO.unpack(told)[1].startswith(b"pinctrl-"):
            return device
    found = f"{len(devices)} chips, none" if devices else "no /dev/gpiochip*, hence none"
    raise GpioError(f"--gpio: {found} labelled pinctrl-..; write CHIP:PIN, or leave --gpio out")
