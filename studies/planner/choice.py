"""What the planner decides between, and the configuration of each choice."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec

from server_node.config import Config
from studies.planner.cuts import CutCost
from wire_protocol.encodings import Encoding

# Factors on the rule's step sizes that are tried.
LEVELS: Final = (0.5, 1.0, 2.0)
# The sizes that the default step sizes were tuned for (docs/findings.md, digits).
_TAU, _K, _K_S, _D_C, _D_S = 16, 16, 1, 2080, 1386


class Probe(NamedTuple):
    """What rounds to the target depend on; `level` is an index of LEVELS."""

    cut: str
    tau: int
    directions_client: int
    directions_server: int
    perturb: tuple[str, ...]
    level: int

    def __str__(self) -> str:
        parts = [f"cut {self.cut}", f"tau {self.tau}", f"K {self.directions_client}"]
        parts += [f"K_s {self.directions_server}"] if self.directions_server > 1 else []
        parts += [f"perturbing {' '.join(self.perturb)}"] if self.perturb else []
        return ", ".join(parts)


class Choice(NamedTuple):
    """A probe's settings, and how its tensors cross the network."""

    probe: Probe
    encoding: Encoding


def step_sizes(base: Config, cut: CutCost, probe: Probe) -> tuple[float, float]:
    """eta_c and eta_s: the configuration's, from the sizes they were tuned for to the probe's.

    More directions make an estimate quieter and more weights noisier, so both steps grow with
    sqrt(K / d), where their tuned values lie between the first power that stability alone would
    give and none; eta_s falls with sqrt(tau), as tuned for 1 and 16 (docs/findings.md).
    """
    level = LEVELS[probe.level]
    client = math.sqrt(probe.directions_client / _K * _D_C / cut.d_c)
    server = math.sqrt(probe.directions_server / _K_S * _D_S / cut.d_s * _TAU / probe.tau)
    return base.method.eta_c * client * level, base.method.eta_s * server * level


def configured(base: Config, cut: CutCost, probe: Probe) -> Config:
    """The configuration of a probe."""
    eta_c, eta_s = step_sizes(base, cut, probe)
    return msgspec.structs.replace(
        base,
        model=msgspec.structs.replace(base.model, cut=probe.cut, perturb=list(probe.perturb)),
        method=msgspec.structs.replace(
            base.method, tau=probe.tau, directions_client=probe.directions_client,
            directions_server=probe.directions_server, eta_c=float(f"{eta_c:.3g}"),
            eta_s=float(f"{eta_s:.3g}"),
        ),
    )  # fmt: skip
