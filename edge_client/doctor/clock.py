"""The clock: who keeps it, and how far it is from the enrolment server's.

A broker does not tell the time. Where no server is named, all that can be said is whether the
kernel's clock is synchronised, and whether it is plainly in the past.
"""

from __future__ import annotations

import http.client
import shutil
import ssl
import subprocess
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from edge_client.doctor.findings import Board, Findings, error, ok, warning
from wire_protocol.errors import IdentityError
from wire_protocol.tls import trusting

_NTP_FILES: Final = ("run/systemd/timesync/synchronized", "var/lib/systemd/timesync/clock")
_WARN_S: Final = 2.0  # HTTP dates have a second's resolution
_ERROR_S: Final = 60.0
_TIMEOUT_S: Final = 5.0
_SET: Final = (
    "let it reach an NTP server (timedatectl set-ntp true), or set it: timedatectl set-time"
)


def check_clock(board: Board, now_s: float) -> Findings:
    """Whether somebody keeps the clock right; `now_s` is Unix time."""
    saved = board.root / _NTP_FILES[1]
    try:
        saved_s = saved.stat().st_mtime
    except OSError:
        saved_s = 0.0
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s))
    oldest_s = max(saved_s, Path(__file__).stat().st_mtime)
    if now_s < oldest_s:
        yield error(
            "clock", f"{shown}, but files of this system are newer",
            "in the past, certificates are not valid yet: no TLS connection comes about", _SET,
        )  # fmt: skip
    elif _synchronised(board):
        yield ok("clock", f"{shown}, synchronised by NTP")
    else:
        yield warning(
            "clock", f"{shown}, not synchronised as far as the system tells",
            "a board without a clock battery starts in the past; certificates then fail", _SET,
        )  # fmt: skip


def check_skew(url: str, ca: Path | None) -> Findings:
    """The difference to the Date header of the enrolment server at `url`."""
    try:
        skew_s = _skew_s(url, ca)
    except (OSError, ValueError, http.client.HTTPException, IdentityError) as failure:
        yield warning(
            "clock-skew", f"{url} did not tell the time ({' '.join(str(failure).split())})",
            "a wrong clock makes certificates fail", "check the URL, or leave --url out",
        )  # fmt: skip
        return
    told = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} {urlsplit(url).netloc}"
    if abs(skew_s) >= _ERROR_S:
        yield error("clock-skew", told, "certificates may count as expired or not yet valid", _SET)
    elif abs(skew_s) >= _WARN_S:
        yield warning("clock-skew", told, "logs of devices and server do not line up", _SET)
    else:
        yield ok("clock-skew", f"{told}, to a second")


def _skew_s(url: str, ca: Path | None) -> float:
    """Our clock less the server's at the middle of the request."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write https://HOST:PORT")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = trusting(ca) if ca else ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=_TIMEOUT_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
    try:
        before_s = time.time()
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("Date")
        after_s = time.time()
    finally:
        connection.close()
    if date is None:
        raise ValueError("its answer has no Date")
    # The header drops the fraction: half a second is what it drops on average.
    return (before_s + after_s) / 2 - parsedate_to_datetime(date).timestamp() - 0.5


def _synchronised(board: Board) -> bool:
    if (board.root / _NTP_FILES[0]).exists():
        return True
    timedatectl = shutil.which("timedatectl") if board.root == Path("/") else None
    if timedatectl is None:
        return False
    try:
        # The kernel's flag, whichever daemon sets it.
        done = subprocess.run(
            [timedatectl, "show", "--property=NTPSynchronized", "--value"],
            check=False, capture_output=True, text=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == "yes"
