"""What forbids a choice: memory of a device, memory of the server, or what a run refuses.

A device holds (docs/architecture.md, docs/performance.md): its program and ONNX Runtime, 87 MB as
measured; its weights twice and the signs of a direction; the input; h+, h-, their difference and
what the graph holds inside; and 1 + K frames until the commit.
"""

from __future__ import annotations

from typing import Final

from server_node.config import Config, check_config
from server_node.errors import ConfigError
from studies.planner.choice import Choice
from studies.planner.cuts import CutCost
from studies.planner.fleet import Fleet
from studies.planner.timing import Traffic

# docs/performance.md: imports 63.2 MB, and 24 MB for ONNX Runtime's first session and the link.
DEVICE_BASE_BYTES: Final = 87_200_000
# A process that has imported torch (benchmarks/memory.py: first-order device, imports).
SERVER_BASE_BYTES: Final = 230_000_000
_SCRATCH_BYTES: Final = 256 << 10
_FLOAT_BYTES: Final = 4


def device_bytes(config: Config, cut: CutCost, input_bytes: int, sent: Traffic) -> int:
    """Peak memory of a device, estimated."""
    weights = 2 * _FLOAT_BYTES * cut.d_c + cut.d_c // 8 + _SCRATCH_BYTES
    a_sample = 2 * input_bytes + cut.inner_bytes + 3 * cut.activation_bytes
    return DEVICE_BASE_BYTES + weights + config.devices.batch * a_sample + sent.up


def server_bytes(fleet: Fleet, config: Config, cut: CutCost, directions: int) -> int:
    """Peak memory of the server, estimated: vectors of weights, and frames that wait."""
    drawn = config.participants
    replicas = drawn if fleet.server.mode == "parallel" else 1
    vectors = 3 if replicas == 1 else 1 + 3 * replicas
    activation = config.devices.batch * cut.activation_bytes
    frames = drawn * (1 + directions) * activation + 2 * replicas * activation
    host = 2 * cut.d_s + 3 * cut.d_c
    return SERVER_BASE_BYTES + _FLOAT_BYTES * (vectors * cut.d_s + host) + frames


def forbids(
    fleet: Fleet, config: Config, cut: CutCost, choice: Choice, input_bytes: int, sent: Traffic
) -> str:
    """The limit that forbids a choice, or nothing; `config` is the choice's."""
    need = device_bytes(config, cut, input_bytes, sent)
    for kind in fleet.device:
        if kind.forward_s and cut.cut not in kind.forward_s:
            return f"no forward_s of this cut for {kind.name}"
        if need > kind.memory_bytes:
            return f"{_mb(need)} MB on {kind.name}, {_mb(kind.memory_bytes)} MB available"
    need = server_bytes(fleet, config, cut, choice.probe.directions_client)
    if need > fleet.server.memory_bytes:
        return f"{_mb(need)} MB on the server, {_mb(fleet.server.memory_bytes)} MB available"
    return _refused(config)


def _refused(config: Config) -> str:
    try:
        check_config(config, "")
    except ConfigError as error:
        return str(error).removeprefix(": ")
    return ""


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f}"
