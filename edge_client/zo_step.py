"""One round of the device, pure: activation first, then the K differences, in groups.

Algorithm 1 of MU-SplitFed (arXiv 2510.21155), client side: h at the unperturbed weights, then
h+ - h- for each direction. The weights theta are never touched; perturbed weights go to the
session's buffer, so nothing has to be restored and theta stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_client.power.phases import FORWARD, PERTURB, WAIT, Stopwatch
from wire_protocol.directions import DirectionGenerator, DirectionId

# Differences are sent in groups of about this size: the server measures while we go on.
GROUP_BYTES: Final = 256 << 10

Vector = NDArray[np.float32]


class Forward(Protocol):
    """The client half: `parameters` is read by `forward`.

    A result is one of two reused buffers: it outlives the next call, not the one after.
    """

    parameters: Vector

    def forward(self, xs: Sequence[NDArray[Any]]) -> Vector:
        """xs[input] (batch, *input shape) -> activation (batch, *activation shape)."""
        ...


class Activation(NamedTuple):
    """h (batch, *activation shape) at the unperturbed weights: the session's buffer."""

    tensor: Vector


class Differences(NamedTuple):
    """h+ - h- for directions first_k.., shape (directions, batch, *activation shape)."""

    first_k: int
    tensor: Vector


@dataclass
class PhaseClock:
    """Seconds spent by phase in one round; `stopwatch` is the whole program's, if there is one."""

    read_s: Callable[[], float]
    perturb_s: float = 0.0
    forward_s: float = 0.0
    encode_s: float = 0.0
    stopwatch: Stopwatch | None = None

    def enter(self, phase: str) -> float:
        """Begin a phase; returns now."""
        return self.read_s() if self.stopwatch is None else self.stopwatch.enter(phase)


def zo_step(
    session: Forward,
    theta: Vector,
    xs: Sequence[NDArray[Any]],
    origin: DirectionId,
    directions: int,
    lam: float,
    generator: DirectionGenerator,
    clock: PhaseClock,
) -> Iterator[Activation | Differences | None]:
    """Yield the Activation, then groups of Differences; None after each direction in between.

    Tensors are reused buffers: what is kept must be copied before the next part is asked for.

    theta (d_c,), xs[input] (batch, *input shape); `origin` is the direction at k = 0.
    """
    begin_s = clock.enter(PERTURB)
    np.copyto(session.parameters, theta)
    turn_s = clock.enter(FORWARD)
    activation = session.forward(xs)
    clock.forward_s += clock.enter(WAIT) - turn_s
    clock.perturb_s += turn_s - begin_s
    yield Activation(activation)
    group = max(1, min(directions, GROUP_BYTES // max(1, activation.nbytes)))
    differences = np.empty((group, *activation.shape), np.float32)
    for first_k in range(0, directions, group):
        count = min(group, directions - first_k)
        for row in range(count):
            direction = DirectionId(*origin[:-1], first_k + row)
            _difference(session, theta, xs, direction, lam, generator, clock, differences[row])
            if row + 1 < count:
                yield None
        yield Differences(first_k, differences[:count])


def derivatives(
    session: Forward,
    theta: Vector,
    xs: Sequence[NDArray[Any]],
    gradient: Vector,
    origin: DirectionId,
    directions: int,
    lam: float,
    generator: DirectionGenerator,
    clock: PhaseClock,
) -> Iterator[float]:
    """Cut-gradient feedback: <g, h+ - h-> of each direction, to first order L(h+) - L(h-).

    g is `gradient` = dL/dh (batch, *activation shape) at h. Summed in float64; one difference is
    held at a time.
    """
    difference = np.empty_like(gradient)
    for k in range(directions):
        direction = DirectionId(*origin[:-1], k)
        _difference(session, theta, xs, direction, lam, generator, clock, difference)
        yield float(np.einsum("i,i->", gradient.ravel(), difference.ravel(), dtype=np.float64))


def _difference(
    session: Forward, theta: Vector, xs: Sequence[NDArray[Any]], direction: DirectionId,
    lam: float, generator: DirectionGenerator, clock: PhaseClock, out: Vector,
) -> None:  # fmt: skip
    """Out = f(theta + lam u) - f(theta - lam u); the signs of u are drawn once for both."""
    begin_s = clock.enter(PERTURB)
    octets = generator.signs_packed(direction, theta.shape[0])
    generator.add_packed(octets, lam, theta, session.parameters)
    plus_s = clock.enter(FORWARD)
    plus = session.forward(xs)
    turn_s = clock.enter(PERTURB)
    generator.add_packed(octets, -lam, theta, session.parameters)
    minus_s = clock.enter(FORWARD)
    minus = session.forward(xs)
    assert minus is not plus  # see Forward
    with np.errstate(over="ignore", invalid="ignore"):  # the server tells of what is not finite
        np.subtract(plus, minus, out=out)
    end_s = clock.enter(WAIT)
    clock.perturb_s += plus_s - begin_s + minus_s - turn_s
    clock.forward_s += turn_s - plus_s + end_s - minus_s
