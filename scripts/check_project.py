"""What neither ruff nor mypy can check: who may import whom, and that everything is documented."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click
import msgspec

from musplit.cli import main as command_line
from server_node.config import Config

ROOT: Final = Path(__file__).resolve().parent.parent
_ROOMS: Final = (
    "wire_protocol", "identity", "firmware_profiles", "edge_client", "export", "server_node",
    "emulation", "studies", "musplit",
)  # fmt: skip


class Room(NamedTuple):
    """What the files of a room may import, beside the standard library and the room itself."""

    rooms: set[str]
    packages: set[str]


# docs/architecture.md shows the same table.
RULES: Final = {
    "wire_protocol": Room(set(), {"numpy", "msgspec"}),
    "identity": Room({"wire_protocol"}, {"cryptography", "msgspec"}),
    "firmware_profiles": Room({"wire_protocol"}, {"msgspec"}),
    "edge_client": Room(
        {"wire_protocol", "identity", "firmware_profiles"}, {"numpy", "msgspec", "psutil"}
    ),
    "export": Room({"wire_protocol"}, {"numpy", "msgspec", "torch", "onnxruntime", "safetensors"}),
    "server_node": Room(
        {"wire_protocol", "identity", "export"},
        {"numpy", "msgspec", "torch", "matplotlib", "PIL", "safetensors"},
    ),
    "emulation": Room(
        {"wire_protocol", "identity", "firmware_profiles", "edge_client", "export", "server_node"},
        {"numpy", "msgspec", "amqtt", "rich"},
    ),
    "studies": Room(
        {"wire_protocol", "edge_client", "export", "server_node", "emulation"},
        {"numpy", "msgspec", "torch", "matplotlib", "rich"},
    ),
    "musplit": Room(set(_ROOMS), {"click"}),
}
# Few files know MQTT, ONNX Runtime and zstd.
FILES: Final = {
    "wire_protocol/encodings.py": {"backports"},
    "wire_protocol/mqtt.py": {"paho"},
    "wire_protocol/paho_client.py": {"paho"},
    "edge_client/doctor/probe.py": {"onnxruntime"},
    "edge_client/session.py": {"onnxruntime"},
}


def import_faults() -> Iterator[str]:
    """Imports that break the rule."""
    for room, rule in RULES.items():
        for path in sorted((ROOT / room).glob("**/*.py")):
            name = path.relative_to(ROOT).as_posix()
            allowed = rule.rooms | rule.packages | FILES.get(name, set()) | {room}
            for line, module in _imports(path):
                if module not in allowed and module not in sys.stdlib_module_names:
                    yield f"{name}:{line}: {room} may not import {module}"


def command_faults() -> Iterator[str]:
    """Commands and options without help, or absent from docs/commands.md."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name, command in command_line.commands.items():
        if not command.help:
            yield f"musplit {name}: has no help"
        section = re.search(rf"^## musplit {name}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if section is None:
            yield f"docs/commands.md: has no section '## musplit {name}'"
            continue
        within = command.commands if isinstance(command, click.Group) else {}
        for option in (
            p for c in (command, *within.values()) for p in c.params if isinstance(p, click.Option)
        ):
            if not option.help:
                yield f"musplit {name} {option.opts[0]}: has no help"
            if option.opts[0] not in section[1]:
                yield f"docs/commands.md: section {name} does not mention {option.opts[0]}"


def configuration_faults() -> Iterator[str]:
    """Configuration fields absent from docs/configuration.md."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for section in msgspec.structs.fields(Config):
        for field in msgspec.structs.fields(section.type):
            key = f"`{section.name}.{field.name}`"
            if f"| {key} |" not in text:
                yield f"docs/configuration.md: has no row for {key}"


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def main() -> None:
    """Print every fault; exit code 1 when there is one."""
    faults = [*import_faults(), *command_faults(), *configuration_faults()]
    for fault in faults:
        print(fault)
    if faults:
        sys.exit(1)
    print("imports, commands and configuration: in order")


if __name__ == "__main__":
    main()
