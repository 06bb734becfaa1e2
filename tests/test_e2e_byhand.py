"""Broker, server and devices started by hand, in separate folders; bytes counted outside."""

from __future__ import annotations

import json
import threading
from typing import Any, NamedTuple

import pytest
from harness import TINY, Bench, Digests, Proxy, here, read_jsonl, undisturbed

from wire_protocol.messages import Chunk, Commit, DownMessage, End, Round, Snapshot, decode_down
from wire_protocol.mqtt import Address, Link, Received
from wire_protocol.topics import Topics

CONFIG = {**TINY, "run.rounds": 12, "evaluation.control": True}
NO_CONTROL = {**CONFIG, "evaluation.control": False}
# Alphabetically the reverse of the shards that they carry.
DEVICES = {"zulu": "shard-000.npz", "alpha": "shard-001.npz"}
PARAMETERS_CLIENT = 64 * 32 + 32


class Observer:
    """Subscribes to everything the server says, and keeps it in order of arrival."""

    def __init__(self, address: Address) -> None:
        topics = Topics("lab")
        self.heard: list[tuple[str, DownMessage]] = []
        self._link = Link("observer", address, subscriptions=(topics.down("+"), topics.broadcast))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._link.open(10.0)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            event = self._link.next_event(0.1)
            if isinstance(event, Received):
                self.heard.append((event.topic, decode_down(event.payload)))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._link.close()


class ByHand(NamedTuple):
    """A finished run, the proxy between its devices and the broker, and what was said."""

    codes: dict[str, int]
    summary: dict[str, Any]
    proxy: Proxy
    heard: list[tuple[str, DownMessage]]
    device_order: list[str]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory) -> ByHand:
    """Two devices through a counting proxy, with the frozen-client control after the run."""
    folder = tmp_path_factory.mktemp("by-hand")
    with Bench(folder) as bench:
        address = bench.broker()
        sharding = here("shard", "digits", "--devices", "2", "--out", str(folder / "shards"))
        assert sharding.exit_code == 0, sharding.stderr
        observer = Observer(address)
        try:
            server = bench.serve(address, folder / "run", CONFIG)
            proxy = bench.proxy(address)
            children = {
                name: bench.device(name, proxy.address, folder / "shards" / shard)
                for name, shard in DEVICES.items()
            }
            codes = {"server": server.finish(90.0)}
            codes |= {name: child.finish(10.0) for name, child in children.items()}
            assert codes["server"] == 0, server.stderr
        finally:
            observer.close()
    rows = read_jsonl(folder / "run" / "devices.jsonl")
    order = {row["device"]: row["device_id"] for row in rows}
    summary = json.loads((folder / "run" / "summary.json").read_text())
    in_order = [order[index] for index in sorted(order)]
    return ByHand(codes, summary, proxy, observer.heard, in_order)


def test_every_command_ends_with_0_by_itself(by_hand):
    assert by_hand.codes == {"server": 0, "zulu": 0, "alpha": 0}


def test_indices_follow_the_shards_and_not_the_names(by_hand):
    assert by_hand.device_order == ["zulu", "alpha"]


def test_the_digests_are_those_of_the_fleet_in_one_process(by_hand):
    """As those of `emulate` are: test_e2e_emulate."""
    assert Digests.of(by_hand.summary) == undisturbed(NO_CONTROL)


def test_the_frozen_client_control_was_run(by_hand):
    assert 0.0 <= by_hand.summary["accuracy_frozen_client"] <= 1.0
    assert by_hand.summary["control_bytes_up"] > 0


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_reported_bytes_are_those_on_the_wire(by_hand, way):
    """The devices' own counts, summed over run, bundle and control, agree with the proxy's."""
    names = (f"bytes_{way}", f"bundle_bytes_{way}", f"control_bytes_{way}")
    reported = sum(by_hand.summary[name] for name in names)
    assert reported == pytest.approx(getattr(by_hand.proxy, f"bytes_{way}"), rel=0.02)
    assert by_hand.proxy.connections == len(DEVICES)


def test_no_weights_travel_after_the_first_round_opens(by_hand):
    """A device that keeps up gets rounds, scalars and commits; never chunks or a snapshot."""
    kinds = [type(message) for _, message in by_hand.heard]
    opened = kinds.index(Round)
    assert Chunk in kinds[:opened]
    assert not {Chunk, Snapshot} & set(kinds[opened:])
    assert kinds.count(Commit) == 2 * 12
    assert kinds.count(End) == 2


def test_a_device_round_costs_the_downlink_a_fraction_of_the_weights(by_hand):
    per_round = by_hand.summary["bytes_down"] / by_hand.summary["client_rounds"]
    assert by_hand.summary["parameters_client"] == PARAMETERS_CLIENT
    assert by_hand.summary["bundle_bytes_down"] > 2 * 4 * PARAMETERS_CLIENT
    assert per_round < 4 * PARAMETERS_CLIENT / 8
