"""The device's share of one run: weights, rounds and commits. No I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_client.bundle import Bundle
from edge_client.pacing import PacedSession
from edge_client.power.phases import ENCODE, REPLAY, WAIT, Stopwatch
from edge_client.shard import Shard
from edge_client.zo_step import Activation, PhaseClock, derivatives, zo_step
from wire_protocol.client_optimiser import ClientRule, ClientState
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream, batch_indices
from wire_protocol.energy import RunEnergy
from wire_protocol.errors import HeaderError
from wire_protocol.frames import Frame, FrameKind, encode_frame
from wire_protocol.manifest import prepare_inputs, sha256
from wire_protocol.messages import Commit, Derivatives, Report, Welcome

_NO_LABELS = np.empty(0, np.uint32)


class Shared(NamedTuple):
    """The client half's state and a generator, of many devices that stand at the same round."""

    client: ClientState
    generator: DirectionGenerator


class Trainer:
    """Client half of one run. `state` is that before round `next_round`: weights and optimiser."""

    def __init__(
        self,
        welcome: Welcome,
        session: PacedSession,
        bundle: Bundle,
        shard: Shard,
        read_clock_s: Callable[[], float],
        shared: Shared | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """`shared`: what a simulated device does not have for itself.

        `stopwatch`: of the program around, on the same clock.
        """
        self.welcome = welcome
        rule = ClientRule(welcome.optimiser, welcome.momentum, welcome.beta2)
        self._client = (
            ClientState(rule, bundle.initial_parameters()) if shared is None else shared.client
        )
        self.next_round = 0
        self._bundle = bundle
        self._session = session
        self._shard = shard
        self._generator = DirectionGenerator() if shared is None else shared.generator
        self._read_clock_s = read_clock_s
        self._stopwatch = Stopwatch(read_clock_s) if stopwatch is None else stopwatch
        self._clock = PhaseClock(read_clock_s, stopwatch=self._stopwatch)
        self._measured_round: int | None = None
        self._sent_s = 0.0

    @property
    def theta(self) -> NDArray[np.float32]:
        """The weights (d_c,)."""
        return self._client.theta

    @property
    def state(self) -> NDArray[np.float32]:
        """The weights and the optimiser's state."""
        return self._client.state

    def steps(self, epoch: int) -> Iterator[bytes | None]:
        """Compute round `next_round`: frames to send as they are ready, None between directions."""
        welcome, number = self.welcome, self.next_round
        self._clock = self._new_clock()
        self._measured_round = number
        xs, labels = self._batch()
        self._session.start_round(number)
        directions = welcome.directions if welcome.feedback == "loss_difference" else 0
        for part in zo_step(
            self._session, self.theta, xs, self._origin, directions, welcome.lam,
            self._generator, self._clock,
        ):  # fmt: skip
            self._session.leave()
            if part is None:
                yield None
                self._session.go_on()
                continue
            begin_s = self._stopwatch.enter(ENCODE)
            first = isinstance(part, Activation)
            frame = Frame(
                FrameKind.ACTIVATION if first else FrameKind.DIFFERENCES,
                welcome.run, epoch, number, 0 if isinstance(part, Activation) else part.first_k,
                part.tensor, labels if first else _NO_LABELS, welcome.encoding,
            )  # fmt: skip
            with self._session.other_work():
                payload = encode_frame(frame, compressed=welcome.compression == "zstd")
            self._sent_s = self._stopwatch.enter(WAIT)
            self._clock.encode_s += self._sent_s - begin_s
            yield payload
            self._session.go_on()

    def check_gradient(self, frame: Frame) -> None:
        """Raise HeaderError unless a cut gradient is one of this run's."""
        welcome, shape = self.welcome, (self.welcome.batch, *self._bundle.manifest.activation.shape)
        if welcome.feedback != "cut_gradient" or frame.kind is not FrameKind.CUT_GRADIENT:
            raise HeaderError(f"{frame.kind.name.lower()}, which is not for a device of this run")
        if frame.encoding not in (welcome.encoding, "float32"):
            raise HeaderError(f"frame in {frame.encoding}, the run has {welcome.encoding}")
        if frame.tensor.shape != shape or len(frame.labels):
            raise HeaderError(f"cut gradient of shape {frame.tensor.shape}, not {shape}")
        if not np.isfinite(frame.tensor).all():
            raise HeaderError("cut gradient with values that are not finite")

    def answer(self, epoch: int, gradient: NDArray[np.float32]) -> Iterator[Derivatives | None]:
        """Cut-gradient feedback for round `next_round`: None between directions, then the answer.

        `gradient` (batch, *activation shape) is dL/dh. Needs nothing of `steps`: a device that was
        started again in between goes on here.
        """
        welcome, number = self.welcome, self.next_round
        if self._measured_round != number:
            self._clock = self._new_clock()
            self._measured_round = number
        self._session.begin()
        scalars: list[float] = []
        for scalar in derivatives(
            self._session, self.theta, self._batch()[0], gradient, self._origin,
            welcome.directions, welcome.lam, self._generator, self._clock,
        ):  # fmt: skip
            scalars.append(scalar)
            self._session.leave()
            yield None
            self._session.go_on()
        self._sent_s = self._read_clock_s()
        with np.errstate(over="ignore"):  # the server refuses what is not finite
            payload = np.asarray(scalars, "<f4").tobytes()
        yield Derivatives(welcome.run, epoch, number, payload)

    def _new_clock(self) -> PhaseClock:
        return PhaseClock(self._read_clock_s, stopwatch=self._stopwatch)

    @property
    def _origin(self) -> DirectionId:
        """Direction k = 0 of this device in round `next_round`."""
        welcome = self.welcome
        return DirectionId(
            welcome.run_seed, Stream.CLIENT_HALF, welcome.device, self.next_round, 0, 0
        )

    def _batch(self) -> tuple[list[NDArray[Any]], NDArray[np.uint32]]:
        """Inputs and labels (batch,) of round `next_round`."""
        welcome = self.welcome
        chosen = batch_indices(
            welcome.run_seed, welcome.device, self.next_round, welcome.batch, self._shard.samples
        )
        xs = prepare_inputs([x[chosen] for x in self._shard.xs], self._bundle.manifest.inputs)
        return xs, self._shard.y[chosen].astype(np.uint32)

    def apply(self, commit: Commit) -> float:
        """Replay the commit of `next_round`; returns the seconds it took.

        When the commit names a digest that the weights do not have, they start over from the
        bundle: `next_round` is 0 then, and the caller asks for what is missing. Raises BundleError.
        """
        begin_s = self._stopwatch.enter(REPLAY)
        with self._session.other_work():
            self._client.apply(commit, self.welcome.run_seed, self.welcome.lam, self._generator)
        self.next_round = commit.round + 1
        if commit.client_sha256 and sha256(self.state) != commit.client_sha256:
            self.start_over()
        return self._stopwatch.enter(WAIT) - begin_s

    def start_over(self) -> None:
        """Back to the bundle's weights and round 0."""
        self._bundle.read_weights(self.theta.view(np.uint8))
        self._client.start_over()
        self.next_round = 0

    @property
    def scratch(self) -> NDArray[np.float32]:
        """A buffer as long as `state`, free between rounds: what is read there can be restored."""
        buffer = self._session.parameters
        return buffer if len(buffer) == len(self.state) else np.empty_like(self.state)

    def restore(self, weights: NDArray[np.float32], next_round: int) -> bool:
        """Take saved weights or a snapshot; False when their number is not this model's."""
        if weights.shape != self.state.shape:
            return False
        self.state[...] = weights
        self.next_round = next_round
        return True

    def report(
        self, epoch: int, round_number: int, started_unix_s: float, replay_s: float, *,
        stream: tuple[int, int], bundle: tuple[int, int], rss: tuple[int, int], energy: RunEnergy,
    ) -> Report:  # fmt: skip
        """What the round cost; byte pairs are (up, down), rss is (now, peak) in bytes.

        `energy` is that of the run so far. Phases are zero when this device did not compute the
        round.
        """
        took_part = self._measured_round == round_number
        clock = self._clock if took_part else self._new_clock()
        wait_s = max(0.0, self._read_clock_s() - replay_s - self._sent_s) if took_part else 0.0
        return Report(
            run=self.welcome.run, epoch=epoch, round=round_number,
            started_unix_s=started_unix_s if took_part else 0.0,
            perturb_s=clock.perturb_s, forward_s=clock.forward_s, encode_s=clock.encode_s,
            wait_s=wait_s, replay_s=replay_s,
            bytes_up=stream[0], bytes_down=stream[1],
            bundle_bytes_up=bundle[0], bundle_bytes_down=bundle[1],
            rss_bytes=rss[0], peak_rss_bytes=rss[1], energy=energy,
        )  # fmt: skip
