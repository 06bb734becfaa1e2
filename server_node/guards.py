"""What keeps large steps and a large tau from doing harm: clipping, rejection, smaller steps.

What a guard does shows in the journaled scalars and weights, so a replay needs none of this. What
a guard remembers between rounds is a function of the journal: a run that was stopped goes on with
the same memory. Nothing here depends on the order in which devices arrive.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server_node.journal import Guarded, Record, Resumed, RoundClosed
from server_node.sections import GuardsSection

# Rounds that medians are taken over.
WINDOW_ROUNDS: Final = 8
# Rounds in a row whose averaged weights were not finite, before the run is called diverged.
BARREN_ROUNDS: Final = 5
# A rejected step halves the device's next ones; each accepted one lets them grow again.
_SMALLER: Final = 0.5
_LARGER: Final = 1.25
# A rise of the loss by this part is float32 noise, or too small to matter.
_TOLERATED_RISE: Final = 1e-4
# The same on fresh activations, where good steps too end a little higher now and then: with 1e-4
# safe runs are slowed, with 2e-2 steps that are too large get through (docs/findings.md).
_TOLERATED_FRESH_RISE: Final = 5e-3
# Small pools can have a loss near 0 by luck; above this part of the first loss nobody is judged.
_FLOOR: Final = 0.1
# Of all devices; journaled when they are not 1.
_FACTORS: Final = ("backtrack_server", "backtrack_client", "client_factor", "server_factor")
_ALL: Final = -1  # in a record: of no device in particular


class Intervened(NamedTuple):
    """Of one round: what its row in rounds.csv shows."""

    rejected: int  # server steps taken back
    clipped: int  # scalars cut down, both halves
    fraction_server: float
    fraction_client: float
    factor_server: float  # on eta_s
    factor_client: float  # on eta_c
    pooled_loss: float | None  # before the round's steps, mean over its devices


@dataclass
class _Open:
    """A device's share of the open round."""

    factor: float
    loss: float | None = None
    counts: Counter[str] = field(default_factory=Counter)


class Guards:
    """The guards of one run; `records` are those of its journal when it goes on."""

    def __init__(self, rules: GuardsSection, records: Iterable[Record] = ()) -> None:
        self._rules = rules
        # Interventions by the names in the journal: scalars, steps, rounds.
        self.totals: Counter[str] = Counter()
        self.curvature: float | None = None  # largest trace measured of the server half's Hessian
        self.client_factor = 1.0  # on eta_c, since the pooled loss has jumped
        self.server_factor = 1.0  # on eta_s, since a round's step did harm on fresh activations
        self.harmful = False  # a guard intervened in the last round
        self._factors: dict[int, float] = {}  # of server steps, by device; 1 when absent
        self._open: dict[int, _Open] = {}
        self._scalars: dict[str, deque[NDArray[np.float32]]] = {
            half: deque(maxlen=WINDOW_ROUNDS) for half in ("server", "client")
        }
        self._limits = dict.fromkeys(self._scalars, math.inf)
        self._losses: deque[float] = deque(maxlen=WINDOW_ROUNDS)
        self._first_loss = self._best = math.inf
        self._streak = self._barren = 0
        found: list[Guarded] = []
        for record in records:
            if isinstance(record, Guarded):
                found.append(record)
            elif isinstance(record, RoundClosed):
                self.closed(record, found)
                found = []
            elif isinstance(record, Resumed):
                found = []  # of a round that was cut off

    # -- steps -------------------------------------------------------------------------------

    @property
    def rejects(self) -> bool:
        """True when steps are judged by the loss of their own batch."""
        return self._rules.reject

    def shape(self, device: int, done: Sequence[Sequence[float]], row: list[float]) -> list[float]:
        """The scalars to apply of a step's measured ones: clipped, then scaled.

        A row that is not finite becomes zeros when steps can be rejected; otherwise it stays.
        """
        if not done or device not in self._open:
            self._open[device] = _Open(self._factors.get(device, 1.0))
        share = self._open[device]
        if not all(map(math.isfinite, row)):
            return [0.0] * len(row) if self.rejects else row
        limit = self._limits["server"]
        if self._rules.clip and math.isinf(limit):  # no round is closed yet: its own steps so far
            own = [abs(scalar) for before in done for scalar in before if scalar]
            limit = self._rules.clip * median(own) if own else limit
        row = self._clip(share, "clip_server", limit, row)
        return row if share.factor == 1.0 else [_float32(share.factor * value) for value in row]

    def accepts(self, device: int, before: float, after: float) -> bool:
        """Judge a step by the mean loss of its two sides and that of the candidate."""
        share = self._open[device]
        good = math.isfinite(before) and after <= before + _TOLERATED_RISE * abs(before)
        share.factor = min(1.0, share.factor * (_LARGER if good else _SMALLER))
        share.counts["reject"] += not good
        return good

    def clip_client(self, device: int, scalars: list[float]) -> list[float]:
        """Scalars of a device's directions, cut down to the limit."""
        share = self._open.setdefault(device, _Open(self._factors.get(device, 1.0)))
        return self._clip(share, "clip_client", self._limits["client"], scalars)

    def observe(self, device: int, loss: float) -> None:
        """The loss of a device's batch before its first step of the round."""
        share = self._open.setdefault(device, _Open(self._factors.get(device, 1.0)))
        share.loss = loss

    def _clip(self, share: _Open, name: str, limit: float, row: list[float]) -> list[float]:
        if not any(limit < abs(value) < math.inf for value in row):
            return row
        share.counts[name] += sum(limit < abs(value) < math.inf for value in row)
        bound = _float32(limit)
        return [
            math.copysign(bound, value) if limit < abs(value) < math.inf else value for value in row
        ]

    # -- rounds ------------------------------------------------------------------------------

    def adapt_client(self, devices: Sequence[int]) -> float:
        """The factor on eta_c of the round of these devices, whose steps are all computed.

        A client step that was too large shows one round later, in the loss of fresh activations.
        """
        loss = self._pooled(devices)
        if not self._rules.backtrack_client or loss is None:
            return self.client_factor
        known = len(self._losses) > 1
        jumped = known and not loss <= self._rules.diverged_factor * median(self._losses)
        return min(1.0, self.client_factor * (_SMALLER if jumped else _LARGER))

    def adapt_server(self, after: float, before: float) -> float:
        """The factor on eta_s from the next round on.

        Mean losses of the round's activations, which no step has seen yet: at the round's server
        weights, and at those one round earlier. A device's own batch does not tell how far apart
        the devices' copies drift, nor what they learn by heart.
        """
        worse = not after <= before + _TOLERATED_FRESH_RISE * abs(before)
        return min(1.0, self.server_factor * (_SMALLER if worse else _LARGER))

    def report(
        self, number: int, devices: Sequence[int], for_all: dict[str, float]
    ) -> list[Guarded]:
        """What the journal is told of a round: of its devices, and `for_all` but idle factors."""
        found: list[Guarded] = []
        for device in devices:
            share = self._open.pop(device, None)
            if share is None:
                continue
            found += [Guarded(number, device, name, n) for name, n in share.counts.items() if n]
            if share.factor != self._factors.get(device, 1.0):
                found.append(Guarded(number, device, "factor", share.factor))
        found += [
            Guarded(number, _ALL, name, value)
            for name, value in for_all.items()
            if name not in _FACTORS or value != 1.0
        ]
        return found

    def losses(self, devices: Sequence[int]) -> dict[str, float]:
        """The pooled loss of a round under its name in the journal, if a guard asks for it."""
        loss = self._pooled(devices)
        wanted = self._rules.patience or self._rules.backtrack_client
        return {"loss": loss} if wanted and loss is not None else {}

    def closed(self, record: RoundClosed, found: Sequence[Guarded]) -> Intervened:
        """Take over a journaled round and what was journaled of its guards."""
        value = {(guard.device, guard.guard): guard.value for guard in found}
        counts: Counter[str] = Counter()
        for (device, name), number in value.items():
            if name == "factor":
                self._factors[device] = number
            elif name in ("clip_server", "clip_client", "reject"):
                counts[name] += int(number)
        for name in ("backtrack_server", "backtrack_client", "not_finite_server",
                     "not_finite_client"):  # fmt: skip
            counts[name] += (_ALL, name) in value
        traces = [self.curvature, value.get((_ALL, "curvature_server"))]
        self.curvature = max((trace for trace in traces if trace is not None), default=None)
        used, self.server_factor = self.server_factor, value.get((_ALL, "server_factor"), 1.0)
        counts["server_factor"] += used < 1.0
        factor = value.get((_ALL, "client_factor"), 1.0)
        counts["client_factor"] += factor < 1.0
        self.client_factor = factor
        self.totals += counts
        barren = counts["not_finite_server"] or counts["not_finite_client"]
        self._barren = self._barren + 1 if barren else 0
        loss = value.get((_ALL, "loss"))
        self._judge(loss)
        self.harmful = self._streak > 0 or any(
            counts[name] for name in counts if not name.startswith("clip")
        )
        if self._rules.clip:
            self._remember(record)
        return Intervened(
            counts["reject"], counts["clip_server"] + counts["clip_client"],
            value.get((_ALL, "backtrack_server"), 1.0) if not counts["not_finite_server"] else 0.0,
            value.get((_ALL, "backtrack_client"), 1.0) if not counts["not_finite_client"] else 0.0,
            used, factor, loss,
        )  # fmt: skip

    # -- questions ---------------------------------------------------------------------------

    @property
    def doubtful(self) -> bool:
        """The last rounds' loss is far above the best: these weights must not replace good ones."""
        return self._streak > 0

    @property
    def diverged(self) -> str:
        """Why the run should end, or empty."""
        remedy = "use smaller steps, or [guards] backtrack_server and reject"
        if self._barren >= BARREN_ROUNDS:
            return f"{BARREN_ROUNDS} rounds in a row led to weights that are not finite; {remedy}"
        if self._rules.patience and self._streak >= self._rules.patience:
            return (
                f"the devices' loss (median of {WINDOW_ROUNDS} rounds) was above "
                f"{self._rules.diverged_factor:g} times its best ({self._best:.3g}) for "
                f"{self._streak} rounds in a row; {remedy}"
            )
        return ""

    # -- inside ------------------------------------------------------------------------------

    def _pooled(self, devices: Sequence[int]) -> float | None:
        shares = [self._open[device] for device in devices if device in self._open]
        losses = [share.loss for share in shares if share.loss is not None]
        return math.fsum(losses) / len(losses) if losses else None

    def _judge(self, loss: float | None) -> None:
        if loss is None:
            return
        if not math.isfinite(loss):
            self._streak += 1
            return
        self._losses.append(loss)
        usual = median(self._losses)
        if math.isinf(self._first_loss):
            self._first_loss = loss
        self._best = min(self._best, usual)
        bound = self._rules.diverged_factor * max(self._best, _FLOOR * self._first_loss)
        self._streak = self._streak + 1 if usual > bound else 0

    def _remember(self, record: RoundClosed) -> None:
        """Medians follow what was applied, zeros apart: of rejected steps and frozen halves."""
        for half, parts in (
            ("server", [share.server_scalars for share in record.shares]),
            ("client", [share.client_scalars for share in record.shares]),
        ):
            scalars = np.abs(np.frombuffer(b"".join(parts), "<f4"))
            self._scalars[half].append(scalars[scalars > 0])
            known = np.concatenate(list(self._scalars[half]))
            self._limits[half] = (
                self._rules.clip * float(np.median(known)) if len(known) else np.inf
            )


def _float32(value: float) -> float:
    """The nearest float32: what the journal carries."""
    return ctypes.c_float(value).value
