"""The configuration of a run: frozen structs, read from TOML, checked once.

docs/configuration.md explains every field; a test keeps it complete.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from server_node.combinations import nonsense
from server_node.errors import ConfigError
from server_node.sections import (
    DataSection,
    DevicesSection,
    EmulationSection,
    EvaluationSection,
    GuardsSection,
    MethodSection,
    ModelSection,
    RoundSection,
    RunSection,
    Section,
    ServerSection,
    SimulationSection,
    WireSection,
)
from wire_protocol.errors import InputError
from wire_protocol.messages import MAX_CONTROL_BYTES
from wire_protocol.parts import MIN_PACKET_BYTES
from wire_protocol.topics import check_name

# A commit's share of one device beside its scalars, generously.
_ENTRY_BYTES: Final = 32


class Config(Section, frozen=True):
    """One run. Sections and fields are those of the TOML file."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    devices: DevicesSection = DevicesSection()
    method: MethodSection = MethodSection()
    round: RoundSection = RoundSection()
    guards: GuardsSection = GuardsSection()
    wire: WireSection = WireSection()
    server: ServerSection = ServerSection()
    evaluation: EvaluationSection = EvaluationSection()
    emulation: EmulationSection = EmulationSection()
    simulation: SimulationSection = SimulationSection()

    @property
    def participants(self) -> int:
        """Devices drawn a round; all of them when the field is 0."""
        return self.devices.participants or self.devices.count

    def sha256(self) -> str:
        """Digest of every field, in a canonical order."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def load_config(path: Path | None, overrides: list[str]) -> Config:
    """Read a TOML file, if any, and apply `section.key=value` overrides. Raises ConfigError."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # numbers too long, nests too deep
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _override(tree, override)
    where = "--set" if path is None else str(path)
    try:
        config = msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        text = explain(error)
        field = text.partition(":")[0].partition("[")[0]
        given = [override for override in overrides if override.partition("=")[0].strip() == field]
        where = f"--set {given[-1]!r}" if given else where
        raise ConfigError(f"{where}: {text}; see docs/configuration.md") from error
    check_config(config, where)
    return config


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load_config` reads back."""
    lines: list[str] = []
    for section, fields in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in fields.items()]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """JSON, which TOML reads too, but for tables, nan and inf, and DEL: that must be escaped."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return "[" + ",".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot and section and field):
        raise ConfigError(f"--set {override!r}: write section.key=value, e.g. method.tau=4")
    text = text.strip()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text  # a bare word is a string
    if f"{section}.{field}" in _text_fields():  # so is a number where a name belongs: model.cut=3
        value = value if isinstance(value, str) else text
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override!r}: {section!r} is not a section")
    table[field] = value


@functools.cache
def _text_fields() -> frozenset[str]:
    """The fields, as section.field, that are strings; asking msgspec takes a while."""
    fields = msgspec.structs.fields
    return frozenset(
        f"{section.name}.{field.name}"
        for section in fields(Config)
        for field in fields(section.type)
        if field.type is str
    )


def explain(error: msgspec.ValidationError) -> str:
    """Msgspec's "... - at `$.method.tau`" with the field in front."""
    what, _, where = str(error).partition(" - at `$")
    return f"{where.strip('`.')}: {what}" if where else what


def check_config(config: Config, where: str) -> None:
    """Raise ConfigError when fields contradict each other; `where` is what the message names."""
    try:
        check_name(config.run.fleet, "run.fleet")
    except InputError as error:
        raise ConfigError(f"{where}: {error}") from error
    count, drawn = config.devices.count, config.participants
    commit_bytes = (drawn + 16) * _ENTRY_BYTES + drawn * 4 * config.method.directions_client
    limits = {"wire.packet_limit": config.wire.packet_limit,
              "emulation.max_packet_bytes": config.emulation.max_packet_bytes}  # fmt: skip
    problems = {
        f"{field}: {limit} is below {MIN_PACKET_BYTES}, which the smallest messages need; 0 is "
        "no limit": 0 < limit < MIN_PACKET_BYTES
        for field, limit in limits.items()
    }
    problems |= {
        f"devices.participants: {drawn} devices with {config.method.directions_client} directions "
        f"make a commit of {commit_bytes} bytes, above {MAX_CONTROL_BYTES}; use fewer": (
            commit_bytes > MAX_CONTROL_BYTES
        ),
        f"devices.participants: {drawn} cannot be drawn from {count} devices": drawn > count,
        f"round.quorum: {config.round.quorum} exceeds the {drawn} devices of a round": (
            config.round.quorum > drawn
        ),
        "round.quorum: needs round.deadline_s > 0; without a deadline a round waits for all": (
            config.round.quorum > 0 and config.round.deadline_s == 0
        ),
        f"server.replicas: {config.server.replicas} exceed the {drawn} devices of a round": (
            config.server.replicas > drawn
        ),
        **_problems_of_time(config),
        "round.stall_s: must exceed round.rejoin_s and round.deadline_s": (
            config.round.stall_s <= max(config.round.rejoin_s, config.round.deadline_s)
        ),
        'guards.reject: judges zeroth-order steps; method.server_order is "first"': (
            config.guards.reject and config.method.server_order == "first"
        ),
        "emulation.speed: has more entries than devices": len(config.emulation.speed) > count,
        "emulation.delay_s: has more entries than devices": len(config.emulation.delay_s) > count,
        "emulation.fleet: says speeds and delays itself; leave emulation.speed and "
        "emulation.delay_s empty": bool(config.emulation.fleet)
        and bool(config.emulation.speed or config.emulation.delay_s),
        "simulation.recorded: names no run folder, which simulation.compute = recorded needs": (
            config.simulation.compute == "recorded" and not config.simulation.recorded
        ),
        "simulation.flops: the first must not exceed the second": (
            config.simulation.flops[0] > config.simulation.flops[1]
        ),
    }
    problems |= nonsense(config.method, config.server)
    for problem, holds in problems.items():
        if holds:
            raise ConfigError(f"{where}: {problem}")


def _problems_of_time(config: Config) -> dict[str, bool]:
    """Combinations of tau, mode and waiting that make no sense, and whether they hold."""
    method, rule, drawn = config.method, config.round, config.participants
    adaptive, asynchronous = method.tau_mode == "adaptive", rule.mode == "asynchronous"
    return {
        f"method.tau_cap: {method.tau_cap} is below method.tau, {method.tau}, where adaptive tau "
        "starts": adaptive and method.tau_cap < method.tau,
        "round.quorum, round.deadline_s: nobody waits for anybody when round.mode is "
        "asynchronous; leave them at 0": asynchronous and (rule.quorum > 0 or rule.deadline_s > 0),
        f"round.staleness_limit: {rule.staleness_limit} is below the {drawn} devices that work at "
        "once, whose contributions overtake each other": (
            asynchronous and rule.staleness_limit < drawn
        ),
        "server.replicas: contributions are computed one by one when round.mode is asynchronous; "
        "use 1": asynchronous and config.server.replicas > 1,
        "method.server_batch: pooled needs the rounds of round.mode barrier": (
            asynchronous and method.server_batch == "pooled"
        ),
    }
