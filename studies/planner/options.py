"""All choices of a fleet: which a limit forbids, and how long a round of the others takes."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Final, NamedTuple

import numpy as np

from server_node.config import Config
from server_node.errors import ConfigError
from studies.planner.choice import LEVELS, Choice, Probe, configured
from studies.planner.cuts import CutCost, ModelCuts
from studies.planner.fleet import Fleet
from studies.planner.limits import forbids
from studies.planner.timing import (
    Draws,
    Parts,
    Traffic,
    draw_rounds,
    mean_seconds,
    parts_of_round,
    round_seconds,
    traffic,
)
from wire_protocol.encodings import Encoding

# Another encoding than the first must save so much of a round: it adds noise to the scalars.
_WORTH_IT: Final = 0.98


class Excluded(NamedTuple):
    """A choice that a limit forbids, whatever its tau."""

    cut: str
    directions_client: int
    encoding: str
    limit: str


class Options:
    """What may be chosen for a fleet; rounds are drawn once and shared by all choices."""

    def __init__(self, fleet: Fleet, base: Config, model: ModelCuts) -> None:
        """Raises ConfigError where [search] names a cut that is none."""
        self.fleet, self.base, self._input_bytes = fleet, base, model.input_bytes
        self.cuts = _wanted(fleet, model.cuts)
        self._draws = draw_rounds(fleet, base)
        self.excluded: list[Excluded] = []
        self._traffic = cache(self._count)
        self.choices: dict[Probe, Choice] = {}
        self.round_s: dict[Probe, float] = {}
        for probe in self._probes():
            self._weigh(probe)
        self.excluded = list(dict.fromkeys(self.excluded))

    def config(self, probe: Probe) -> Config:
        """The configuration of a probe."""
        return configured(self.base, self.cuts[probe.cut], probe)

    def sent(self, choice: Choice) -> Traffic:
        """Bytes of a participant's round."""
        return self._traffic(choice.probe.cut, choice.probe.directions_client, choice.encoding)

    def seconds(self, choice: Choice, draws: Draws | None = None) -> float:
        """The mean round."""
        cut, drawn = self.cuts[choice.probe.cut], draws or self._draws
        rounds = round_seconds(self.fleet, self.base, cut, choice, drawn, self.sent(choice))
        return float(np.mean(rounds))

    def parts(self, choice: Choice) -> Parts:
        """What the mean round is made of."""
        cut = self.cuts[choice.probe.cut]
        return parts_of_round(self.fleet, self.base, cut, choice, self._draws, self.sent(choice))

    def means_s(self, cut: CutCost, directions: int) -> list[float]:
        """Of each device's forwards in a round."""
        return mean_seconds(self.fleet, self.base, cut, directions)

    def forbidden(self, choice: Choice) -> str:
        """The limit that forbids a choice, or nothing."""
        return forbids(
            self.fleet, self.config(choice.probe), self.cuts[choice.probe.cut], choice,
            self._input_bytes, self.sent(choice),
        )  # fmt: skip

    def _count(self, cut: str, directions: int, encoding: Encoding) -> Traffic:
        return traffic(self.base, self.cuts[cut], directions, encoding)

    def _probes(self) -> list[Probe]:
        search = self.fleet.search
        sizes = itertools.product(
            self.cuts, search.tau, search.directions_client, search.directions_server,
            [tuple(names) for names in search.perturb],
        )  # fmt: skip
        return [Probe(*size, level=0) for size in sizes]

    def _weigh(self, probe: Probe) -> None:
        allowed: list[tuple[float, Choice]] = []
        for encoding in self.fleet.search.encoding:
            choice = Choice(probe, encoding)
            limit = self.forbidden(choice)
            if limit:
                self.excluded.append(Excluded(probe.cut, probe.directions_client, encoding, limit))
            else:
                allowed.append((self.seconds(choice), choice))
        if not allowed:
            return
        first_s = allowed[0][0]
        better = [one for one in allowed if one[0] < _WORTH_IT * first_s]
        round_s, chosen = min(better or allowed[:1], key=lambda one: one[0])
        for level in range(len(LEVELS)):
            at = probe._replace(level=level)
            self.choices[at], self.round_s[at] = chosen._replace(probe=at), round_s


def _wanted(fleet: Fleet, cuts: list[CutCost]) -> dict[str, CutCost]:
    legal = {cut.cut: cut for cut in cuts}
    for name in fleet.search.cuts:
        if name not in legal:
            raise ConfigError(
                f"search.cuts: {name!r} is no cut of this model, or another learns the same "
                f"and sends less; there are {', '.join(legal)}"
            )
    return {name: legal[name] for name in fleet.search.cuts or legal}
