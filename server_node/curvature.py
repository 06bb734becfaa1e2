"""The curvature of the server half in a run, and the step-size rule it enters.

Second differences along Rademacher directions u: E[u'Hu] is the trace of the Hessian H
(Hutchinson 1990). For a quadratic loss f = x'Hx/2 and the step x - eta/K sum_k u_k u_k' H x,

    E f(after) - f = -eta |Hx|^2 + eta^2/2 (trace(H)/K |Hx|^2 + (1 + 1/K) x'H^3 x - ..)

which falls for every x when eta (trace(H)/K + lambda_max) < 2, about: the rule. Half of it,
eta trace(H)/K below 1, leaves room for lambda_max and for curvature that grows on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from server_node.half import ServerHalf
from server_node.sections import MethodSection
from server_node.torch_half import ActivationBatch

# Of the rule's left side, without lambda_max.
RULE_LIMIT: Final = 1.0
_PROBES: Final = 16
_ROWS: Final = 256
# A perturbation of this part of the weights' root mean square: large against float32 rounding
# of the losses, small against the distance over which the curvature changes.
_RELATIVE_LAM: Final = 0.05
_SMALLEST_LAM: Final = 1e-4


def trace_of_hessian(half: ServerHalf, batches: Sequence[ActivationBatch]) -> float:
    """Estimate of trace(H) of the mean loss at the base weights, on the first rows of `batches`."""
    chosen: list[ActivationBatch] = []
    for batch in batches:
        chosen.append(batch)
        if sum(len(b.labels) for b in chosen) >= _ROWS:
            break
    lam = max(_SMALLEST_LAM, _RELATIVE_LAM * half.root_mean_square())
    return half.second_difference(chosen, lam, _PROBES)


def step_rule(method: MethodSection, trace: float) -> float:
    """The left side of the rule at the full step size, without lambda_max."""
    return method.eta_s * trace / method.directions_server


def warning(method: MethodSection, trace: float) -> str:
    """What to tell of a step beyond the rule; empty when it is within."""
    rule = step_rule(method, trace)
    if not rule > RULE_LIMIT:
        return ""
    return (
        f"method.eta_s: eta_s x trace(H) / K_s is {rule:.2g} (measured trace {trace:.3g}); above "
        f"{RULE_LIMIT:g} zeroth-order steps tend to diverge. Use a smaller method.eta_s, a larger "
        "method.directions_server, or guards.backtrack_server and guards.reject"
    )
