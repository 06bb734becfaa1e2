"""A fleet in this process: the same run, coordinator and device step without MQTT or processes.

For tests, tuning and tables: full barrier, no faults, and the digests of the real thing.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from edge_client.bundle import read_bundle
from edge_client.pacing import PacedSession
from edge_client.session import ClientSession
from edge_client.shard import Shard
from edge_client.trainer import Trainer
from server_node.config import Config
from server_node.datasets import load_dataset
from server_node.partition import partition
from server_node.prepare import Experiment, open_run
from server_node.resume import History
from server_node.run import Run
from server_node.samples import Dataset
from wire_protocol.frames import decode_frame
from wire_protocol.messages import Commit, DownMessage, Round


class InProcessFleet:
    """Devices as objects; an Outbox for the run. `shuffle` mixes the order of arrival."""

    def __init__(self, experiment: Experiment, shuffle: random.Random | None = None) -> None:
        self._bundle = read_bundle(experiment.exported.client)
        self._experiment = experiment
        self._shards = make_shards(experiment.config)
        self._shuffle = shuffle
        self._trainers: list[Trainer] = []
        self._opened: deque[Round] = deque()

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
            notify=lambda _: None, history=history,
        )  # fmt: skip
        self._trainers = [self._trainer(run, index) for index in range(len(self._shards))]
        for commit in history.commits if history is not None else ():
            self.broadcast(commit)
        run.start([index for index, _ in names])
        while run.finished is None and not enough(run):
            self._deliver(run, self._opened.popleft())
        run.close(run.finished.outcome.value if run.finished is not None else "stopped")
        return run

    def broadcast(self, message: DownMessage) -> None:
        """Commits are replayed at once; rounds are computed when their turn comes."""
        if isinstance(message, Commit):
            for trainer in self._trainers:
                trainer.apply(message)
        elif isinstance(message, Round):
            self._opened.append(message)

    def send(self, device: int, message: DownMessage) -> None:
        """Replies are acknowledgements; nothing gets lost here."""

    def offer_blob(self, data: bytes) -> str:
        """Nobody falls behind here."""
        raise NotImplementedError("an in-process device never misses a commit")

    def _deliver(self, run: Run, opened: Round) -> None:
        frames = [
            (device, decode_frame(payload))
            for device in opened.participants
            for payload in self._trainers[device].steps(epoch=0)
            if payload is not None
        ]
        if self._shuffle is not None:
            self._shuffle.shuffle(frames)
        for device, frame in frames:
            run.frame(device, frame)
            if self._shuffle is not None and self._shuffle.getrandbits(1):
                run.work()
        while run.work():
            pass

    def _trainer(self, run: Run, index: int) -> Trainer:
        config = run.config
        welcome = run.welcome(index, 0, len(self._experiment.client.manifest_data))
        session = ClientSession(self._bundle, config.devices.batch, config.devices.threads)
        paced = PacedSession(session, speed=1.0, delay_s=0.0)
        return Trainer(welcome, paced, self._bundle, self._shards[index], time.monotonic)


def make_shards(config: Config, data: Dataset | None = None) -> list[Shard]:
    """The shards that `musplit shard` would write for this configuration, in memory.

    `data` is its data set, for who has loaded it already.
    """
    data = load_dataset(config.data) if data is None else data
    parts = partition(data.y_train, config.devices.count, config.data.alpha, config.run.seed)
    return [
        Shard(Path(f"shard {index}"), [x[part] for x in data.x_train], data.y_train[part], index)
        for index, part in enumerate(parts)
    ]
