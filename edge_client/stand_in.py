"""A device that stands for another board: how long that board takes for a forward.

What the board was measured to need for this very graph, if its profile says so; otherwise what
this machine needs when nobody disturbs it, times the board's ratio to it. Devices of one machine
measure in turns, and the first one's result serves all: their ratios are those of the profiles,
however busy the machine is.
"""

from __future__ import annotations

import fcntl
import itertools
import math
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from edge_client.bundle import Bundle
from edge_client.errors import PaceError
from edge_client.pacing import Pacing
from edge_client.power.choose import Board
from edge_client.session import ClientSession
from edge_client.zo_step import PhaseClock, zo_step
from firmware_profiles.schema import Calibrated, Power
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream
from wire_protocol.messages import Welcome

# How long the undisturbed step is measured, and how often at least.
_MEASURE_S: Final = 1.0
_STEPS: Final = 5
# Of the measured steps, this part is taken to be disturbed by nobody.
_UNDISTURBED: Final = 0.1
_DIRECTIONS: Final = 2  # of the measured step at most: perturbing weighs little against forwards
# Measurements on one machine differ by this much without anybody being to blame.
_TOLERANCE: Final = 1.1
_TWO_53: Final = 1 << 53

NotNegative = Annotated[float, Meta(ge=0, le=1e9)]


class Delay(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds waited before each round's first forward: a distribution of mean `mean_s`."""

    mean_s: NotNegative = 0.0
    model: Literal["constant", "exponential", "uniform"] = "constant"
    spread: Annotated[float, Meta(ge=0, le=1)] = 0.5  # uniform: mean_s times 1 - spread .. 1 + it

    def draw_s(self, run_seed: int, device: int, number: int) -> float:
        """Of round `number`: a function of its coordinates."""
        if self.model == "constant" or not self.mean_s:
            return self.mean_s
        # The last word keeps these numbers apart from directions and from simulated delays.
        philox = np.random.Philox(key=[run_seed, device], counter=[0, number, 0, 2])
        u = (int(philox.random_raw()) >> 11) / _TWO_53
        if self.model == "exponential":
            return -self.mean_s * math.log1p(-u)
        return self.mean_s * (1.0 + self.spread * (2.0 * u - 1.0))


class StandIn(Struct, frozen=True, forbid_unknown_fields=True):
    """The file of --stand-in: which board, and what is known of its speed."""

    board: str
    ratio: Annotated[float, Meta(gt=0, le=1e9)]  # time of a step there / here
    threads: Annotated[int, Meta(ge=1)]  # of the board
    host_threads: Annotated[int, Meta(ge=1)]  # of a step here, when it is measured
    turns: str  # folder for what the devices of this machine measure
    calibrated: list[Calibrated] = []
    delay: Delay = Delay()
    power: Power | None = None  # what the model of its energy rests on
    cores: Annotated[int, Meta(ge=1)] = 1
    slow_motion: Annotated[float, Meta(ge=1)] = 1.0  # all takes so many times as long as there

    def pacing(self, welcome: Welcome, bundle: Bundle) -> Pacing:
        """For one run. Raises PaceError when the board is faster than this machine."""
        here_s = self.here_s(bundle, welcome.batch, welcome.directions)
        there_s = self.slow_motion * (
            self.calibrated_s(bundle.manifest.graph.sha256, welcome.batch, welcome.directions)
            or here_s * self.ratio
        )
        if here_s > there_s * _TOLERANCE:
            raise PaceError(
                f"{self.board} takes {1e3 * there_s:.3g} ms for a forward of this model, this "
                f"machine {1e3 * here_s:.3g} ms: too slow to stand for that board; give the fleet "
                'file a larger slow_motion, or "auto"'
            )

        def delay_s(number: int) -> float:
            return self.slow_motion * self.delay.draw_s(welcome.run_seed, welcome.device, number)

        return Pacing(forward_s=there_s, ratio=max(1.0, there_s / here_s), delay_s=delay_s)

    def energy_model(self) -> Board | None:
        """What the board's energy is modelled by."""
        if self.power is None:
            return None
        return Board(self.board, self.power, self.cores, self.threads, self.slow_motion)

    def calibrated_s(self, graph: str, batch: int, directions: int) -> float | None:
        """A forward as measured on the board, for this graph, batch and its own threads.

        In a step of as many directions, or of the number nearest to it.
        """
        fitting = [
            entry
            for entry in self.calibrated
            if (entry.graph, entry.batch, entry.threads) == (graph, batch, self.threads)
        ]
        if not fitting:
            return None
        entry = min(fitting, key=lambda entry: abs(entry.directions - directions))
        return entry.step_s / (2 * entry.directions + 1)

    def known_s(self, graph: str, batch: int, directions: int) -> float | None:
        """What a forward takes on the board, if the step here was measured already."""
        calibrated_s = self.calibrated_s(graph, batch, directions)
        if calibrated_s is not None:
            return calibrated_s
        try:
            text = self._known(graph, batch, directions).read_text(encoding="ascii")
        except OSError:
            return None
        return float(text) * self.ratio

    def here_s(self, bundle: Bundle, batch: int, directions: int) -> float:
        """A forward here, with its perturbation: measured by whoever comes first.

        `directions`: of a step. Raises PaceError when `turns` cannot be used.
        """
        directions = min(directions, _DIRECTIONS)
        known = self._known(bundle.manifest.graph.sha256, batch, directions)
        folder = known.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "turn").open("wb") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                if not known.exists():
                    seconds = measure_forward_s(bundle, batch, directions, self.host_threads)
                    fresh = known.with_suffix(".new")
                    fresh.write_text(repr(seconds), encoding="ascii")
                    fresh.replace(known)
                return float(known.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            raise PaceError(f"{folder}: cannot be used for measuring ({error})") from error

    def _known(self, graph: str, batch: int, directions: int) -> Path:
        """The file that holds what a forward takes here."""
        shown = min(directions, _DIRECTIONS)
        return Path(self.turns) / f"{graph}-{batch}-{shown}-{self.host_threads}"


def read_stand_in(path: Path) -> StandIn:
    """Read the file of --stand-in. Raises PaceError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=StandIn)
    except OSError as error:
        raise PaceError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise PaceError(f"{path}: {error}; musplit emulate --fleet writes such files") from error


def measure_forward_s(bundle: Bundle, batch: int, directions: int, threads: int) -> float:
    """Seconds of a forward, its share of perturbing included, as if nobody else computed.

    With one thread processor time is taken, in which others have no part; with more, the time that
    passes. The fastest steps count.
    """
    session = ClientSession(bundle, batch, threads)
    xs = [np.zeros((batch, *i.shape), i.dtype) for i in bundle.manifest.inputs]
    theta, generator = bundle.initial_parameters(), DirectionGenerator()
    read_s = time.thread_time if threads == 1 else time.perf_counter
    taken_s: list[float] = []
    until_s = time.monotonic() + _MEASURE_S
    for number in itertools.count():
        origin = DirectionId(0, Stream.CLIENT_HALF, 0, number, 0, 0)
        clock = PhaseClock(read_s)
        for _ in zo_step(session, theta, xs, origin, directions, 1e-3, generator, clock):
            pass
        if number:  # the first one warms up
            taken_s.append(clock.perturb_s + clock.forward_s)
        if len(taken_s) >= _STEPS and time.monotonic() > until_s:
            break
    return sorted(taken_s)[int(_UNDISTURBED * len(taken_s))] / (2 * directions + 1)
