"""What a check says: a level, what was seen, why it matters, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from firmware_profiles.schema import Profile

Level = Literal["ok", "warning", "error"]
ERRORS_FOUND: Final = 1  # the exit code; warnings alone do not fail


class Finding(Struct, frozen=True):
    """One line of the report. `why` and `remedy` are empty where nothing is wrong."""

    check: str
    level: Level
    what: str
    why: str = ""
    remedy: str = ""


class Board(NamedTuple):
    """Where the checks look, and what they compare with."""

    root: Path = Path("/")
    profile: Profile | None = None

    def read(self, path: str) -> str | None:
        """The text of a file below the root, or None when it cannot be read."""
        try:
            text = (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return text.replace("\0", " ").strip()

    def glob(self, pattern: str) -> list[Path]:
        """Paths below the root, sorted."""
        return sorted(self.root.glob(pattern))


Findings = Iterator[Finding]


def ok(check: str, what: str) -> Finding:
    """Nothing to do."""
    return Finding(check, "ok", what)


def warning(check: str, what: str, why: str, remedy: str) -> Finding:
    """The board can take part, but less well, or not for long."""
    return Finding(check, "warning", what, why, remedy)


def error(check: str, what: str, why: str, remedy: str) -> Finding:
    """The board cannot take part, or what it gives is worth nothing."""
    return Finding(check, "error", what, why, remedy)
