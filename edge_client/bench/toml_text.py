"""Nested tables as TOML text. Plain values come before tables, as TOML wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec


def to_toml(tree: dict[str, Any]) -> str:
    """Text that tomllib reads back; None is left out."""
    return "\n".join(_table(tree, "")) + "\n"


def _table(tree: dict[str, Any], path: str) -> Iterator[str]:
    for key, value in tree.items():
        if value is not None and not _is_table(value):
            yield f"{key} = {_value(value)}"
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            yield f"\n[{name}]"
            yield from _table(value, f"{name}.")
        elif _is_table(value):
            for row in value:
                yield f"\n[[{name}]]"
                yield from _table(row, f"{name}.")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    )


def _value(value: Any) -> str:
    """JSON, which TOML reads too, but for DEL: that must be escaped."""
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
