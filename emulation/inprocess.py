"""A fleet in this process: the same run, coordinator and device step without MQTT or processes.

For tests, tuning and tables: no faults. With a full barrier it has the digests of the real thing;
asynchronous devices deliver in the order in which they were opened.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from edge_client.bundle import read_bundle
from edge_client.pacing import PacedSession, Pacing
from edge_client.session import ClientSession
from edge_client.shard import Shard
from edge_client.trainer import Trainer
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.errors import NotFiniteError
from server_node.partition import partition
from server_node.prepare import Experiment, open_run
from server_node.resume import History
from server_node.run import Run
from server_node.samples import Dataset, shard_samples
from wire_protocol.frames import Frame, decode_frame, encode_frame
from wire_protocol.messages import Commit, Derivatives, DownMessage, Round, Scalars


class InProcessFleet:
    """Devices as objects; an Outbox for the run. `shuffle` mixes the order of arrival."""

    def __init__(
        self, experiment: Experiment, shuffle: random.Random | None = None,
        read_clock_s: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._bundle = read_bundle(experiment.exported.client)
        self._experiment = experiment
        self._shards = make_shards(experiment.config)
        self._shuffle = shuffle
        self._read_clock_s = read_clock_s
        self._trainers: list[Trainer] = []
        self._opened: deque[Round] = deque()
        self._under_way: deque[tuple[int, list[Frame]]] = deque()  # asynchronous, by device
        self._freed: deque[int] = deque()  # asynchronous: devices whose commit was made
        self._later: dict[int, list[Commit]] = {}  # asynchronous: what came while a device works
        self._gradients: list[tuple[int, Frame]] = []

    def run(
        self, *, frozen: bool = False, history: History | None = None,
        enough: Callable[[Run], bool] = lambda _: False,
    ) -> Run:  # fmt: skip
        """Run the experiment, or on from its `history`, to its end; files as in any run folder.

        Asked before each round, `enough` may end it early, as "stopped".
        """
        names = [(index, f"device-{index:03d}") for index in range(len(self._shards))]
        run = open_run(
            self._experiment, frozen=frozen, devices=names, outbox=self,
            notify=lambda _: None, history=history, read_clock_s=self._read_clock_s,
        )  # fmt: skip
        self._trainers = [self._trainer(run, index) for index in range(len(self._shards))]
        for commit in history.commits if history is not None else ():
            self.broadcast(commit)
        run.start([index for index, _ in names])
        while run.finished is None and not enough(run):
            if run.config.round.mode == "asynchronous":
                self._deliver_next(run)
            else:
                self._deliver(run, self._opened.popleft())
        run.close(run.finished.outcome.value if run.finished is not None else "stopped")
        return run

    def broadcast(self, message: DownMessage) -> None:
        """Commits are replayed at once; rounds are computed when their turn comes."""
        if isinstance(message, Commit):
            for device, trainer in enumerate(self._trainers):
                if device in self._later:
                    self._later[device].append(message)
                else:
                    trainer.apply(message)
            self._freed.extend(entry.device for entry in message.entries)
        elif isinstance(message, Round):
            self._opened.append(message)

    def send(self, device: int, message: DownMessage) -> None:
        """Replies are acknowledgements; a round of its own is computed on the weights of now."""
        if isinstance(message, Round):
            self._later[device] = []
            self._under_way.append((device, self._frames(device)))
        elif isinstance(message, Scalars):
            for commit in self._later.pop(device, ()):
                self._trainers[device].apply(commit)

    def send_frame(self, device: int, frame: Frame) -> None:
        """Cut gradients cross the wire's encoding, and are answered when the server waits."""
        self._gradients.append((device, decode_frame(encode_frame(frame))))

    def offer_blob(self, data: bytes) -> str:
        """Nobody falls behind here."""
        raise NotImplementedError("an in-process device never misses a commit")

    def _deliver(self, run: Run, opened: Round) -> None:
        frames = [
            (device, frame) for device in opened.participants for frame in self._frames(device)
        ]
        if self._shuffle is not None:
            self._shuffle.shuffle(frames)
        for device, frame in frames:
            _offer(run, device, frame)
            if self._shuffle is not None and self._shuffle.getrandbits(1):
                run.work()
        self._work(run)

    def _work(self, run: Run) -> None:
        """Compute what can be computed, the devices' answers to cut gradients included."""
        while run.work():
            pass
        while self._gradients:
            self._answer(run)
            while run.work():
                pass

    def _answer(self, run: Run) -> None:
        """All devices that were sent a cut gradient answer it."""
        gradients, self._gradients = self._gradients, []
        if self._shuffle is not None:
            self._shuffle.shuffle(gradients)
        for device, frame in gradients:
            for answer in self._trainers[device].answer(0, frame.tensor):
                if isinstance(answer, Derivatives):
                    run.derivatives(device, answer)

    def _deliver_next(self, run: Run) -> None:
        index = self._shuffle.randrange(len(self._under_way)) if self._shuffle is not None else 0
        device, frames = self._under_way[index]
        del self._under_way[index]
        self._freed.clear()
        for frame in frames:
            _offer(run, device, frame)
        self._work(run)
        while self._freed and run.finished is None:
            freed = self._freed.popleft()
            run.ready(freed, self._trainers[freed].next_round)

    def _frames(self, device: int) -> list[Frame]:
        payloads = self._trainers[device].steps(epoch=0)
        return [decode_frame(payload) for payload in payloads if payload is not None]

    def _trainer(self, run: Run, index: int) -> Trainer:
        config = run.config
        welcome = run.welcome(index, 0, len(self._experiment.client.manifest_data))
        session = ClientSession(self._bundle, config.devices.batch, config.devices.threads)
        paced = PacedSession(session, Pacing())
        return Trainer(welcome, paced, self._bundle, self._shards[index], time.monotonic)


def make_shards(config: Config, data: Dataset | None = None) -> list[Shard]:
    """The shards that `musplit shard` would write for this configuration, in memory.

    `data` is its data set, for who has loaded it already.
    """
    data = load_dataset(config.data) if data is None else data
    parts = partition(data.y_train, config.devices.count, config.data.alpha, config.run.seed)
    return [
        Shard(Path(f"shard {index}"), *shard_samples(data, part), index)
        for index, part in enumerate(parts)
    ]


def _offer(run: Run, device: int, frame: Frame) -> None:
    """Hand in a tensor; one that is not finite costs its sender the round."""
    with contextlib.suppress(NotFiniteError):
        run.frame(device, frame)
