"""Where the device program's energy comes from: a meter, the board's model, or nowhere."""

from __future__ import annotations

import threading
import time
from typing import Final, Protocol

from edge_client.errors import MeterError
from edge_client.power.account import Account
from edge_client.power.integrate import integrate
from edge_client.power.meter import Meter
from edge_client.power.model import BoardModel
from edge_client.power.phases import PHASES, Stopwatch
from edge_client.power.sampler import Clock, Sampler, SamplingLoop
from wire_protocol.energy import MeasuredByPhase, ModelledByPhase, NoEnergy, RunEnergy

# Idle is measured for so many readings, and no shorter than this.
_IDLE_READINGS: Final = 20
_IDLE_S: Final = 3.0


class EnergySource(Protocol):
    """Tells the energy of a run by phase."""

    stopwatch: Stopwatch

    def begin(self) -> None:
        """A run begins."""
        ...

    def so_far(self) -> RunEnergy:
        """What the run has taken until now."""
        ...

    def close(self) -> None:
        """End a thread, if there is one."""
        ...


class NoSource:
    """Neither meter nor model."""

    def __init__(self, reason: str) -> None:
        self.stopwatch = Stopwatch(time.monotonic)
        self._reason = reason

    def begin(self) -> None:
        """Nothing begins."""

    def so_far(self) -> NoEnergy:
        """The reason."""
        return NoEnergy(self._reason[:400])

    def close(self) -> None:
        """Nothing to end."""


class ModelSource:
    """The model of the board, from the seconds of each phase."""

    def __init__(self, model: BoardModel, slow_motion: float = 1.0) -> None:
        """`slow_motion`: seconds here for one of the board's, in an emulation."""
        self.stopwatch = Stopwatch(time.monotonic)
        self._model, self._slow_motion = model, slow_motion
        self._began = self.stopwatch.seconds()

    def begin(self) -> None:
        """Count from now on."""
        self._began = self.stopwatch.seconds()

    def so_far(self) -> ModelledByPhase:
        """The seconds since then, by the model."""
        now = self.stopwatch.seconds()
        return self._model.by_phase(
            {phase: (now[phase] - self._began[phase]) / self._slow_motion for phase in PHASES}
        )

    def close(self) -> None:
        """Nothing to end."""


class MeterSource:
    """A meter that a thread of its own reads beside the program."""

    def __init__(self, meter: Meter, idle_w: float | None) -> None:
        """Takes the meter over, and starts to read it."""
        self.stopwatch = Stopwatch(time.monotonic)
        self._meter = meter
        self._account = Account(meter.origin, self.stopwatch, idle_w)
        self._loop = SamplingLoop(meter, self._account.take, meter.origin.rate_hz)
        self._stop = threading.Event()
        clock = Clock(time.monotonic, self._stop.wait)
        self._thread = threading.Thread(target=self._loop.run, args=(clock,), daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Count from now on."""
        self._account.begin(time.monotonic())

    def so_far(self) -> MeasuredByPhase | NoEnergy:
        """Until the last reading; a lost sensor, or a gap, is a reason instead."""
        if self._loop.lost:
            return NoEnergy(f"the meter was given up: {self._loop.reason}"[:400])
        return self._account.so_far(time.monotonic(), self._loop.reason)

    def close(self) -> None:
        """End the thread and close the meter."""
        self._stop.set()
        self._thread.join()
        self._meter.close()


def idle_power(meter: Meter) -> float | None:
    """Watts while nothing runs, measured now for some seconds; None when readings are missing."""
    rate_hz = meter.origin.rate_hz
    seconds = max(_IDLE_S, _IDLE_READINGS / rate_hz)
    with Sampler(meter, rate_hz) as sampler:
        begin_s = time.monotonic()
        time.sleep(seconds)
        end_s = time.monotonic()
    try:
        return integrate(sampler.trace(), begin_s, end_s).energy_j / (end_s - begin_s)
    except MeterError:
        return None
