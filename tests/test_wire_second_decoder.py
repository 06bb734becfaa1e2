"""docs/wire-protocol.md is enough: a decoder written from it reads whole recorded runs."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import second_decoder as second
from harness import DIGITS, TINY, Bench, Proxy, flags, make_shards, read_jsonl
from wire_support import MOSQUITTO

from wire_protocol.mqtt import Address

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
FORMS: dict[str, dict[str, object]] = {
    "float32": {},
    "int8, zstd, parts": {"wire.encoding": "int8", "wire.compression": "zstd"},
}
LIMITS = {"float32": 0, "int8, zstd, parts": 700}
RUN = {**TINY, "devices.batch": 16, "method.directions_client": 8}


class Recorder(Proxy):
    """A proxy that keeps what clients and broker say, stream by stream."""

    def __init__(self, upstream: Address) -> None:
        self.streams: dict[socket.socket, bytearray] = {}
        self.uplinks: set[socket.socket] = set()
        self._keep = threading.Lock()
        super().__init__(upstream)

    def _pump(self, source: socket.socket, target: socket.socket, uplink: bool) -> None:  # noqa: FBT001
        with self._keep:
            self.streams[source] = bytearray()
            if uplink:
                self.uplinks.add(source)
        super()._pump(source, target, uplink)

    def _seen(self, source: socket.socket, data: bytes) -> None:
        self.streams[source] += data


class Recorded(NamedTuple):
    """A run: its summary, what devices sent and were sent, and its proxy's byte counts."""

    summary: dict[str, Any]
    up: list[second.Published]
    down: list[second.Published]
    proxied: tuple[int, int]
    reported: tuple[int, int]
    said: str
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Recorded]:
    """One run of each form, at the same time."""
    folder = tmp_path_factory.mktemp("recorded")
    with ThreadPoolExecutor(len(FORMS)) as pool:
        recorded = pool.map(lambda form: record(form, folder / form[:4]), FORMS)
        return dict(zip(FORMS, recorded, strict=True))


@pytest.fixture(params=FORMS)
def recorded(request, runs) -> Recorded:
    found: Recorded = runs[request.param]
    return found


def record(form: str, folder: Path) -> Recorded:
    """A real run: broker, server and two devices as processes; the devices go through a proxy."""
    limit = LIMITS[form]
    with Bench(folder) as bench:
        address = bench.broker("--max-packet", str(limit))
        tap = Recorder(address)
        try:
            run = folder / "run"
            server = bench.start(
                "serve", str(DIGITS), "--broker", str(address), "--out", str(run),
                *flags({**RUN, **FORMS[form]}),
            )  # fmt: skip
            shards = make_shards(folder / "shards")
            devices = [bench.device(f"d{i}", tap.address, s) for i, s in enumerate(shards)]
            assert server.finish() == 0, server.stderr
            assert [device.finish() for device in devices] == [0, 0]
        finally:
            tap.close()
        said = server.stderr + devices[0].stderr
    streams = {way: [bytes(tap.streams[s]) for s in tap.streams if (s in tap.uplinks) == way]
               for way in (True, False)}  # fmt: skip
    up, down = (
        [m for stream in streams[way] for m in second.joined(second.published(stream))]
        for way in (True, False)
    )
    rows = read_jsonl(run / "devices.jsonl")
    last = {row["device"]: row for row in rows}
    reported = tuple(sum(row[f"bytes_{way}"] for row in last.values()) for way in ("up", "down"))
    summary = json.loads((run / "summary.json").read_text())
    return Recorded(summary, up, down, (tap.bytes_up, tap.bytes_down), reported, said, run)


def test_the_second_decoder_uses_none_of_the_projects_code() -> None:
    tree = ast.parse(Path(second.__file__).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "backports"}


def controls(messages: list[second.Published]) -> list[dict[str, Any]]:
    return [second.control(m.payload) for m in messages if not m.topic.endswith("/frame")]


def frames(recorded: Recorded) -> list[tuple[str, second.Frame]]:
    return [(m.topic, second.frame(m.payload)) for m in recorded.up if m.topic.endswith("/frame")]


def test_every_message_decodes_and_stands_on_its_topic(recorded) -> None:
    for message in recorded.up:
        assert re.fullmatch(r"musplit/1/lab/dev/d[01]/up/(control|frame)", message.topic)
    for message in recorded.down:
        assert re.fullmatch(r"musplit/1/lab/(bcast|dev/d[01]/down)", message.topic)
    up = {message["type"] for message in controls(recorded.up)}
    down = {message["type"] for message in controls(recorded.down)}
    assert up == {"join", "fetch", "ready", "report", "leave"}
    assert down >= {"hello", "welcome", "chunk", "round", "scalars", "commit", "end"}
    assert not down & second.UPLINK


def test_frames_have_the_runs_shape_and_labels_in_range(recorded) -> None:
    welcomes = [m for m in controls(recorded.down) if m["type"] == "welcome"]
    welcome = welcomes[0]
    seen: dict[tuple[str, int], set[int]] = {}
    for topic, frame in frames(recorded):
        assert frame.run == welcome["run"]
        assert frame.epoch in {m["epoch"] for m in welcomes}
        assert frame.tensor.dtype == np.float32
        assert np.isfinite(frame.tensor).all()
        assert (
            frame.dtype == {"float32": (1, 1), "int8": (4, 3)}[welcome["encoding"]][frame.kind - 1]
        )
        ks = seen.setdefault((topic, frame.round), set())
        if frame.kind == 1:
            assert frame.tensor.shape == (welcome["batch"], 32)
            assert len(frame.labels) == welcome["batch"]
            assert frame.labels.max() < 10
        else:
            assert frame.tensor.shape[1:] == (welcome["batch"], 32)
            assert len(frame.labels) == 0
            ks |= set(range(frame.first_k, frame.first_k + len(frame.tensor)))
    assert len(seen) == 2 * recorded.summary["rounds"]
    assert all(ks == set(range(welcome["directions"])) for ks in seen.values())


def test_chunks_make_the_blobs_that_the_manifest_names(recorded) -> None:
    blobs: dict[str, dict[int, bytes]] = {}
    for message in controls(recorded.down):
        if message["type"] == "chunk":
            blobs.setdefault(message["digest"], {})[message["index"]] = message["data"]
    for digest, chunks in blobs.items():
        whole = b"".join(chunks[index] for index in sorted(chunks))
        assert hashlib.sha256(whole).hexdigest() == digest
    assert len(blobs) == 3


def test_commits_replayed_by_the_document_give_the_runs_weights(recorded) -> None:
    messages = controls(recorded.down)
    welcome = next(m for m in messages if m["type"] == "welcome")
    chunks = [m for m in messages if m["type"] == "chunk"]

    def blob(digest: str) -> bytes:
        found = {m["index"]: m["data"] for m in chunks if m["digest"] == digest}
        return b"".join(found[index] for index in sorted(found))

    manifest = json.loads(blob(welcome["manifest_sha256"]))
    weights = blob(manifest["weights"]["sha256"])
    theta = np.frombuffer(weights, "<f4", manifest["parameters"]).copy()
    commits = {m["round"]: m for m in messages if m["type"] == "commit"}
    assert sorted(commits) == list(range(recorded.summary["rounds"]))
    digests = 0
    for number in sorted(commits):
        commit = commits[number]
        assert [entry[0] for entry in commit["entries"]] == [0, 1]
        assert all(entry[1] == 0.5 and len(entry[2]) == 32 for entry in commit["entries"])
        second.apply(theta, commit, welcome["run_seed"], welcome["lam"])
        if commit.get("client_sha256"):
            digests += 1
            assert hashlib.sha256(theta.tobytes()).hexdigest() == commit["client_sha256"]
    assert digests == 2
    assert hashlib.sha256(theta.tobytes()).hexdigest() == recorded.summary["client_weights_sha256"]


def test_the_scalars_of_the_reply_are_those_of_the_commit(recorded) -> None:
    messages = controls(recorded.down)
    committed = {
        (m["round"], entry[2]) for m in messages if m["type"] == "commit" for entry in m["entries"]
    }
    replies = {(m["round"], m["scalars"]) for m in messages if m["type"] == "scalars"}
    assert replies == committed


def test_bytes_are_within_2_percent_of_the_proxys(recorded) -> None:
    """Of what the devices reported last; goodbyes come after it."""
    for proxied, reported in zip(recorded.proxied, recorded.reported, strict=True):
        # The last report of each of the two devices, below 700 bytes, does not count itself.
        assert abs(proxied - reported) < 0.02 * proxied + 2 * 700


def test_a_run_says_that_it_chunks(recorded) -> None:
    limited = recorded.summary["encoding"] == "int8"
    assert recorded.summary["chunked"] == limited
    assert ("packets of at most 700 bytes: larger messages go in parts" in recorded.said) == limited
    if limited:
        assert recorded.summary["max_packet_bytes"] == 700
    assert recorded.said.count("larger messages go in parts") == (2 if limited else 0)


HEX = re.compile(r"^```\n(4d55.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_documents_examples_decode() -> None:
    text = (Path(__file__).parents[1] / "docs" / "wire-protocol.md").read_text()
    decoded = []
    for block in HEX.findall(text):
        lines = [re.sub(r"\s{2,}\D.*|\"[^\"]*\"(: \d+)?|map of 4|envelope.*", "", line.strip())
                 for line in block.splitlines()]  # fmt: skip
        payload = bytes.fromhex(re.sub(r"[^0-9a-f]", "", "".join(lines)))
        if payload[:4] == b"MUSC":
            decoded.append(second.control(payload)["type"])
        elif payload[:4] == b"MUSF":
            decoded.append(second.frame(payload).tensor.tolist())
    assert [[0.5, -1.0], [2.0, 0.25]] in decoded
    assert {"ready", "hello", "round", "commit"} <= {d for d in decoded if isinstance(d, str)}
