"""Fields of a configuration that make no sense together, each with its reason."""

from __future__ import annotations

import math

from server_node.sections import MethodSection, ServerSection


def _finite(value: float | list[float]) -> bool:
    return all(map(math.isfinite, value if isinstance(value, list) else [value]))


def nonsense(method: MethodSection, server: ServerSection) -> dict[str, bool]:
    """Problem -> whether it is there."""
    first = method.server_order == "first"
    pooled = method.server_batch == "pooled"
    return {
        'method.server_optimiser, method.server_options: need method.server_order = "first"; '
        "zeroth-order steps have no optimiser": not first and (
            bool(method.server_options) or method.server_optimiser != "SGD"
        ),
        "method.server_options: lr is the step size method.eta_s": "lr" in method.server_options,
        "method.server_options: only finite numbers": not all(
            map(_finite, method.server_options.values())
        ),
        "method.directions_server: first-order steps draw no directions; leave it at 1": (
            first and method.directions_server != 1
        ),
        "method.reuse_rounds: needs method.server_batch = \"pooled\"; a device's own steps are on "
        "its own frame": method.reuse_rounds > 0 and not pooled,
        "server.replicas: first-order steps are computed for one device at a time; use 1": (
            first and server.replicas > 1
        ),
        "server.replicas: pooled steps are computed once for all devices; use 1": (
            pooled and server.replicas > 1
        ),
        "method.tau_mode: pooled steps have no time of a single device to fill; use fixed": (
            pooled and method.tau_mode == "adaptive"
        ),
        "method.tau_mode: more steps put off the cut gradient that a device waits for; use fixed": (
            method.feedback == "cut_gradient" and method.tau_mode == "adaptive"
        ),
    }  # fmt: skip
