"""summary.json of a run folder; without torch, for those who read it or add to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from server_node.files import replace_file

SUMMARY_FILE: Final = "summary.json"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write FOLDER/summary.json."""
    data = (json.dumps(summary, indent=2) + "\n").encode()
    replace_file(folder / SUMMARY_FILE, lambda file: file.write(data))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """FOLDER/summary.json, or None when there is none that can be read."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None
