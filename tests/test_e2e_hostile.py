"""Hostile payloads during a run: they cost their sender the message, and nobody else anything."""

from __future__ import annotations

import json
import math
import random
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from harness import TINY, Bench, Child, Digests, make_shards, read_jsonl, undisturbed, wait_until

from wire_protocol import messages
from wire_protocol.energy import NoEnergy
from wire_protocol.frames import HEADER_BYTES, Frame, FrameKind, encode_frame
from wire_protocol.messages import Join, Leave, Ready, Refused, Report, Round, Welcome
from wire_protocol.mqtt import Address, Link, Received
from wire_protocol.topics import PROTOCOL_VERSION, Topics

TOPICS = Topics("lab")
SILENCE = ""  # ignored without a word
EPOCH = 7
CONFIG = {**TINY, "run.rounds": 30, "server.min_step_s": 0.05}
# The third device is the test's own: it joins, misbehaves, and leaves.
SERVED = {**CONFIG, "devices.count": 3, "round.rejoin_s": 0.5}


class Hostile(NamedTuple):
    """A payload made for a run id; on whose uplink it goes; what the server must say of it."""

    name: str
    device_id: str
    kind: str
    make: Callable[[int], bytes]
    said: str


def frame(
    run: int, *, kind: FrameKind = FrameKind.ACTIVATION, epoch: int = EPOCH,
    shape: tuple[int, ...] = (8, 32), value: float = 0.5, labels: int = 8, label: int = 9,
) -> bytes:  # fmt: skip
    """A frame that fits the run unless told otherwise."""
    return encode_frame(
        Frame(
            kind, run, epoch, 0, 0, np.full(shape, value, np.float32),
            np.full(labels, label, np.uint32),
        )
    )  # fmt: skip


def flipped(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


def lying(payload: bytes, *dims: int) -> bytes:
    """The payload with other dimensions in its header, and a checksum that matches."""
    data = bytearray(payload)
    data[8] = len(dims)
    struct.pack_into("<6I", data, 48, *dims, *(0,) * (6 - len(dims)))
    struct.pack_into("<I", data, 12, zlib.crc32(data[16:]))
    return bytes(data)


def enveloped(body: bytes) -> bytes:
    """Any body as a control message with a checksum that matches."""
    return messages.MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def report(run: int, seconds: float) -> bytes:
    numbers = dict.fromkeys(Report.__struct_fields__, 0) | {
        "run": run, "epoch": EPOCH, "energy": NoEnergy("no meter")
    }  # fmt: skip
    times = {name: seconds for name in numbers if name.endswith("_s")}
    return messages.encode(Report(**(numbers | times)))


def noise(_run: int) -> bytes:
    return random.Random(0).randbytes(2000)


PAYLOADS = [
    Hostile("random bytes as a frame", "d0", "frame", noise, "frame starts with"),
    Hostile("nothing as a frame", "d0", "frame", lambda _: b"", "shorter than its header"),
    Hostile("a flipped bit", "d0", "frame", lambda r: flipped(frame(r)), "checksum"),
    Hostile("a frame cut short", "d0", "frame", lambda r: frame(r)[:-4], "promises"),
    Hostile("a header that promises terabytes", "d0", "frame",
            lambda r: lying(frame(r), 1 << 31, 1 << 10), "promises"),
    Hostile("a header that promises less", "d0", "frame",
            lambda r: lying(frame(r), 2, 2), "promises only"),
    Hostile("another run's frame", "d0", "frame", lambda r: frame(r ^ 1), SILENCE),
    Hostile("another session's frame", "d0", "frame", frame, SILENCE),
    Hostile("a stranger's frame", "stranger", "frame", frame, SILENCE),
    Hostile("random bytes as control", "d0", "control", noise, "starts with"),
    Hostile("nothing as control", "d0", "control", lambda _: b"", "no whole envelope"),
    Hostile("no map", "d0", "control", lambda _: enveloped(b"\xc3"), "malformed"),
    Hostile("nesting without end", "d0", "control",
            lambda _: enveloped(b"\x91" * 100_000), "malformed"),
    Hostile("an unknown message", "d0", "control",
            lambda _: enveloped(b"\x81\xa4type\xa4boom"), "malformed"),
    Hostile("a message over the cap", "d0", "control",
            lambda _: enveloped(b"\xc0" * (1 << 20)), "exceeds"),
    Hostile("the server's own message", "d0", "control",
            lambda r: messages.encode(Round(r, 5, [0])), "malformed"),
    Hostile("another session's leave", "d0", "control",
            lambda _: messages.encode(Leave(EPOCH, "bye")), SILENCE),
    Hostile("another session's readiness", "d0", "control",
            lambda r: messages.encode(Ready(r, EPOCH, 1 << 31)), SILENCE),
    Hostile("a stranger of another protocol", "stranger", "control",
            lambda _: messages.encode(Join(1, 99, "9.9", -1, 1)), SILENCE),
    Hostile("a member's label out of range", "rogue", "frame",
            lambda r: frame(r, label=10), "label 10 is outside 0..9"),
    Hostile("a member's largest label", "rogue", "frame",
            lambda r: frame(r, label=(1 << 32) - 1), "label 4294967295 is outside"),
    Hostile("a member's wrong shape", "rogue", "frame",
            lambda r: frame(r, shape=(8, 31)), "of shape (8, 31)"),
    Hostile("a member's missing labels", "rogue", "frame",
            lambda r: frame(r, labels=7), "with 7 labels"),
    Hostile("a member's values that are not finite", "rogue", "frame",
            lambda r: frame(r, value=math.nan), "not finite"),
    Hostile("a member's differences of a batch", "rogue", "frame",
            lambda r: frame(r, kind=FrameKind.DIFFERENCES), "differences of shape (8, 32)"),
    Hostile("a member's report of endless seconds", "rogue", "control",
            lambda r: report(r, math.inf), "malformed"),
    Hostile("no values, but dimensions beyond any array", "d0", "frame",
            lambda r: lying(frame(r)[:HEADER_BYTES - 32] + bytes(32), 0, *(0xFFFFFFFF,) * 5),
            "refused-message"),
]  # fmt: skip
NAMES = [payload.name for payload in PAYLOADS]


class Rogue:
    """A member of the fleet that does what the test wants."""

    def __init__(self, address: Address) -> None:
        self._link = Link("rogue", address, subscriptions=(TOPICS.down("rogue"), TOPICS.broadcast))
        self.run = -1
        self.refusals: list[str] = []
        self.rounds_opened = 0
        self.present = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._link.open(10.0)
        self._thread.start()

    def leave(self) -> None:
        self.present = False
        self.say(Leave(EPOCH, "done"))

    def say(self, message: messages.UpMessage) -> None:
        self.publish("rogue", "control", messages.encode(message))

    def publish(self, device_id: str, kind: str, payload: bytes) -> None:
        topic = TOPICS.frame(device_id) if kind == "frame" else TOPICS.control(device_id)
        self._link.publish(topic, payload)

    def _listen(self) -> None:
        while not self._stop.is_set():
            event = self._link.next_event(0.1)
            if isinstance(event, Received):
                self._heard(messages.decode_down(event.payload))

    def _heard(self, message: messages.DownMessage) -> None:
        match message:
            case messages.Hello():
                self.say(Join(EPOCH, PROTOCOL_VERSION, "0", -1, 1))
            case Welcome() if message.epoch == EPOCH:
                self.run = message.run
                self.say(Ready(self.run, EPOCH, 0))
            case Round():
                self.rounds_opened = message.round + 1
            case Refused():
                self.refusals.append(message.reason)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._link.close()


class Survived(NamedTuple):
    """What came of every payload, and of the run."""

    outcome: dict[str, str]
    code: int
    folder: Any
    refusals: list[str]
    server: Child


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> Survived:
    """A run of two devices and a rogue, during which everything in PAYLOADS is published."""
    folder = tmp_path_factory.mktemp("hostile")
    outcome = dict.fromkeys(NAMES, "not tried: the server had ended")
    with Bench(folder) as bench:
        address = bench.broker()
        rogue = Rogue(address)
        try:
            server = bench.serve(address, folder / "run", SERVED)
            shards = make_shards(folder / "shards")
            devices = [bench.device(f"d{i}", address, shard) for i, shard in enumerate(shards)]
            wait_until(lambda: rogue.rounds_opened, "the first round", 60.0)
            # First from within the open round; then the rogue leaves, and the others train on.
            for payload in sorted(PAYLOADS, key=lambda p: p.device_id != "rogue"):
                if rogue.present and payload.device_id != "rogue":
                    rogue.leave()
                    wait_until(lambda: rogue.rounds_opened > 1, "the second round")
                if server.process.poll() is None:
                    outcome[payload.name] = attack(rogue, server, payload)
            code = server.finish()
            wait_until(lambda: devices[0].process.poll() is not None, "the devices' end", 20.0)
        finally:
            rogue.close()
    return Survived(outcome, code, folder / "run", rogue.refusals, server)


def attack(rogue: Rogue, server: Child, payload: Hostile) -> str:
    """What the server said of the payload, once it has answered it and what came after it."""
    said = len(server.stderr)
    rogue.publish(payload.device_id, payload.kind, payload.make(rogue.run))
    # Messages of one client arrive in order: a marker tells when the payload was dealt with.
    rogue.publish("marker", "control", b"MUSC")
    deadline_s = time.monotonic() + 5.0
    while "refused-message marker" not in (heard := server.stderr[said:]):
        if server.process.poll() is not None or time.monotonic() > deadline_s:
            return f"the server ended: {heard[-300:]}"
        time.sleep(0.01)
    lines = [line for line in heard.splitlines() if re.match(r"refused-\w+ (?!marker)", line)]
    return "\n".join(lines)


@pytest.mark.parametrize("payload", PAYLOADS, ids=NAMES)
def test_the_server_outlives_the_payload_and_says_what_is_wrong_with_it(attacked, payload):
    outcome = attacked.outcome[payload.name]
    if payload.said is SILENCE:
        assert outcome == ""
    else:
        assert re.match(rf"refused-\w+ {payload.device_id} ", outcome)
        assert payload.said in outcome
        assert len(outcome.splitlines()) == 1


def test_the_honest_devices_end_in_the_digests_of_a_run_of_their_own(attacked):
    assert attacked.code == 0, attacked.server.stderr
    summary = json.loads((attacked.folder / "summary.json").read_text())
    assert Digests.of(summary) == undisturbed(CONFIG)
    assert summary["client_rounds"] == 2 * 30


def test_a_member_is_told_why_it_was_refused(attacked):
    # Of values that are not finite it is not told: they may come from the run's steps.
    members = [
        p for p in PAYLOADS
        if p.device_id == "rogue" and p.kind == "frame" and p.said != "not finite"
    ]  # fmt: skip
    assert len(attacked.refusals) == len(members)
    for reason, payload in zip(attacked.refusals, members, strict=True):
        assert payload.said in reason


def test_refused_messages_are_counted_in_the_rounds(attacked):
    spoken = sum(payload.said is not SILENCE for payload in PAYLOADS)
    rounds = read_jsonl(attacked.folder / "rounds.jsonl")
    assert sum(row["refused_frames"] for row in rounds) == spoken + len(PAYLOADS)  # the markers


def test_the_trace_stays_standard_json(attacked):
    """No NaN and no Infinity, whatever members report."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((attacked.folder / "trace.json").read_text(), parse_constant=refuse)
