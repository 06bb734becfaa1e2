"""The one sampler: a thread that reads a meter at a fixed rate on the monotonic clock.

A reading of 0 W or less is no reading: a board that runs draws power, and a sensor that is off,
or wired the wrong way round, says 0. The gap it leaves is judged as any other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple, Self

import numpy as np

from edge_client.errors import MeterError
from edge_client.power.integrate import Trace
from edge_client.power.meter import Meter, Reading

RATE_HZ: Final = 10.0
# A little faster than asked for: a load whose period is a whole number of readings would otherwise
# meet them at the same phase in the whole window.
_DETUNE: Final = 0.992
# A meter that was silent, or failed, for so long is given up.
GIVE_UP_S: Final = 30.0


class Clock(NamedTuple):
    """Time and waiting; `wait` returns True when the sampler shall stop. Tests have their own."""

    now_s: Callable[[], float]
    wait: Callable[[float], bool]


class SamplingLoop:
    """Reads the meter until it is told to stop, or the meter is lost, and hands readings on."""

    def __init__(self, meter: Meter, take: Callable[[Reading], None], rate_hz: float) -> None:
        """`take` is called in the loop's thread."""
        self._meter = meter
        self._take = take
        self._period_s = _DETUNE / rate_hz
        self.reason = ""  # why readings are missing
        self.lost = False

    def run(self, clock: Clock) -> None:
        """Read at fixed times until `clock.wait` says stop. Late readings are not made up for."""
        next_s = heard_s = clock.now_s()
        while not self.lost:
            if self._read():
                heard_s = clock.now_s()
            now_s = clock.now_s()
            self.lost = now_s - heard_s > GIVE_UP_S
            next_s += self._period_s * max(1, int((now_s - next_s) / self._period_s))
            if clock.wait(max(0.0, next_s - now_s)):
                return

    def _read(self) -> bool:
        try:
            reading = self._meter.read()
        except MeterError as error:
            self.reason = str(error)
            return False
        if reading is None:
            return False
        if reading.power_w <= 0:
            origin = self._meter.origin
            self.reason = f"{origin.meter} reads {reading.power_w:g} W: off, or wired wrongly?"
            return False
        self._take(reading)
        return True


class Sampler:
    """Records a trace beside other work: `start`, then `stop` gives it. Also a context."""

    def __init__(self, meter: Meter, rate_hz: float = RATE_HZ) -> None:
        self._meter = meter
        self._readings: list[Reading] = []
        self._loop = SamplingLoop(meter, self._take, rate_hz)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read in a thread."""
        clock = Clock(time.monotonic, self._stop.wait)
        self._thread = threading.Thread(target=self._loop.run, args=(clock,), daemon=True)
        self._thread.start()

    def stop(self) -> Trace:
        """End the thread; what was read. The meter stays open."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        return self.trace()

    def run(self, clock: Clock) -> Trace:
        """Without a thread: read until `clock` says stop."""
        self._loop.run(clock)
        return self.trace()

    def trace(self) -> Trace:
        """What was read so far."""
        readings = list(self._readings)
        return Trace(
            np.array([reading.t_s for reading in readings]),
            np.array([reading.power_w for reading in readings]),
            self._meter.origin,
            self._loop.reason,
        )

    def _take(self, reading: Reading) -> None:
        if not self._readings or reading.t_s > self._readings[-1].t_s:
            self._readings.append(reading)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.stop()
