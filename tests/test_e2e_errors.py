"""What a user can get wrong: one line on stderr that says so, and a documented exit code."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from click.testing import Result
from harness import DIGITS, LOOPBACK, TINY, Bench, Child, free_port, here, make_shards

from wire_protocol.mqtt import Address

ERROR = "musplit: error: "
CONFIG = str(DIGITS)
DEAD = f"{LOOPBACK}:{{dead}}"


class Mistake(NamedTuple):
    """A command, its exit code, and what its error line must say; {} is filled by `Places`."""

    name: str
    command: list[str]
    code: int
    said: str


MISTAKES = [
    Mistake("a configuration that is not there",
            ["emulate", "missing.toml"], 3, "missing.toml: cannot be read"),
    Mistake("a configuration that is not TOML",
            ["emulate", "{folder}/broken.toml"], 3, "broken.toml: not TOML"),
    Mistake("an unknown field",
            ["emulate", "--set", "method.tua=4"], 3, "tua"),
    Mistake("an unknown section",
            ["emulate", "--set", "methods.tau=4"], 3, "methods"),
    Mistake("a value out of range",
            ["emulate", "--set", "method.tau=0"], 3, "method.tau"),
    Mistake("an override without a value",
            ["emulate", "--set", "method.tau"], 3, "write section.key=value"),
    Mistake("a requirement that is none",
            ["emulate", "--require", "accuracy"], 3, "write FIELD>=VALUE"),
    Mistake("a quorum without a deadline",
            ["emulate", "--set", "round.quorum=1"], 3, "round.deadline_s"),
    Mistake("a dead broker, for the server",
            ["serve", CONFIG, "--broker", DEAD, "--connect-s", "0.5", "--out", "{folder}/dead"],
            4, "cannot be reached"),
    Mistake("a dead broker, for a device",
            ["device", "--id", "d", "--broker", DEAD, "--connect-s", "0.5", "--data", "{shard}"],
            4, "cannot be reached"),
    Mistake("a broker that is none",
            ["device", "--id", "d", "--broker", f"{LOOPBACK}:{{mute}}", "--connect-s", "0.5",
             "--data", "{shard}"], 4, "does not speak MQTT"),
    Mistake("an address without a port number",
            ["device", "--id", "d", "--broker", "host:x", "--data", "{shard}"], 3, "HOST:PORT"),
    Mistake("a device name with a slash",
            ["device", "--id", "a/b", "--broker", DEAD, "--data", "{shard}"], 3, "'a/b'"),
    Mistake("a shard that is not there",
            ["device", "--id", "d", "--broker", DEAD, "--data", "no.npz"], 3, "no.npz: cannot"),
    Mistake("a truncated shard",
            ["device", "--id", "d", "--broker", DEAD, "--data", "{folder}/truncated.npz"],
            3, "truncated.npz: not a readable npz"),
    Mistake("a shard whose bytes were altered",
            ["device", "--id", "d", "--broker", DEAD, "--data", "{folder}/altered.npz"],
            3, "altered.npz: not a readable npz"),
    Mistake("a shard without labels",
            ["device", "--id", "d", "--broker", DEAD, "--data", "{folder}/unlabelled.npz"],
            3, "'y' is missing"),
    Mistake("a folder without a journal",
            ["replay", "{folder}"], 3, "journal.bin: cannot be read"),
    Mistake("an open address without --insecure",
            ["broker", "--listen", "0.0.0.0:{dead}"], 3, "--insecure"),
    Mistake("a port that is taken",
            ["broker", "--listen", f"{LOOPBACK}:{{mute}}"], 3, "cannot listen there"),
    Mistake("an unknown model",
            ["export", "nope", "--cut", "fc1", "--out", "{folder}/unknown"], 3, "nope"),
    Mistake("an illegal cut",
            ["export", "mlp:64-32-10", "--cut", "nope", "--out", "{folder}/halves"], 3, "nope"),
    Mistake("a data set that is not there",
            ["shard", "missing.npz", "--devices", "2", "--out", "{folder}/x"], 3, "missing.npz"),
    Mistake("too few devices",
            ["serve", CONFIG, "--broker", "{broker}", "--set", "round.lobby_s=0.5",
             "--set", "run.fleet=empty", "--out", "{folder}/lonely"], 6, "0 of 8 devices"),
    Mistake("a run folder that holds a run",
            ["serve", CONFIG, "--broker", DEAD, "--out", "{folder}/old"], 3, "holds a run already"),
]  # fmt: skip
USAGE = [
    Mistake("an unknown flag", ["device", "--colour", "red"], 2, "--colour"),
    Mistake("a missing flag", ["device", "--id", "d"], 2, "--broker"),
    Mistake("an unknown command", ["trian"], 2, "trian"),
    Mistake("a flag out of range", ["shard", "digits", "--devices", "0", "--out", "x"], 2, "0"),
]
NAMES = [mistake.name for mistake in MISTAKES]


class Bed(NamedTuple):
    """A broker, a server that waits for its only device, a good shard, the run's bundle."""

    bench: Bench
    broker: Address
    server: Child
    shard: Path
    client: Path


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    with Bench(folder) as bench:
        broker = bench.broker()
        server = bench.serve(broker, folder / "run", {**TINY, "devices.count": 1})
        shard, _ = make_shards(folder / "shards")
        server.wait_for("waiting for")
        yield Bed(bench, broker, server, shard, folder / "run" / "client")


@pytest.fixture(scope="module")
def places(bed):
    """What fills the {} of a mistake; the port `mute` takes connections and never answers."""
    folder = bed.bench.folder
    (folder / "broken.toml").write_text("[run\n")
    (folder / "old").mkdir()
    (folder / "old" / "journal.bin").touch()
    whole = bed.shard.read_bytes()
    (folder / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    altered = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    (folder / "altered.npz").write_bytes(altered)
    np.savez(folder / "unlabelled.npz", x=np.zeros((4, 64), np.uint8))
    with socket.create_server((LOOPBACK, 0)) as mute:
        yield {
            "folder": folder, "shard": bed.shard, "dead": free_port(), "broker": bed.broker,
            "mute": mute.getsockname()[1],
        }  # fmt: skip


def made(mistake: Mistake, places: dict[str, object], folder: Path) -> Result:
    """The mistake, made in this process, in an empty folder."""
    return here(*(part.format(**places) for part in mistake.command), cwd=folder)


@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_a_mistake_costs_one_line_and_its_exit_code(places, tmp_path, mistake):
    """Nothing else is said, but by servers, which tell of the export before."""
    done = made(mistake, places, tmp_path)
    assert done.exit_code == mistake.code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(ERROR)]
    assert len(lines) == 1
    assert mistake.said in lines[0]
    assert done.stderr.endswith(lines[0] + "\n")
    assert done.stdout == ""
    assert mistake.command[0] == "serve" or done.stderr.splitlines() == lines


@pytest.mark.parametrize("mistake", USAGE, ids=[mistake.name for mistake in USAGE])
def test_a_wrong_command_line_gets_a_usage_and_2(mistake):
    done = here(*mistake.command)
    assert done.exit_code == mistake.code
    assert done.stderr.startswith("Usage: ")
    assert mistake.said in done.stderr.splitlines()[-1]


def test_the_program_says_and_returns_the_same(tmp_path):
    for mistake, first in ((MISTAKES[2], ERROR), (USAGE[0], "Usage: ")):
        with Bench(tmp_path) as bench:
            child = bench.run(*mistake.command)
        assert child.code == mistake.code
        assert child.stderr.startswith(first)
        assert mistake.said in child.stderr.splitlines()[-1]
        assert "Traceback" not in child.stderr
        assert child.stdout == ""


def _samples(folder: Path, features: int, label: int) -> list[str]:
    path = folder / "shard.npz"
    np.savez(path, x=np.zeros((20, features), np.uint8), y=np.full(20, label))
    return ["--data", str(path)]


def _other_bundle(folder: Path, client: Path) -> list[str]:
    """A sound bundle of another digest: its manifest ends in one more line break."""
    shutil.copytree(client, folder / "bundle")
    with (folder / "bundle" / "manifest.json").open("ab") as file:
        file.write(b"\n")
    return ["--bundle", str(folder / "bundle")]


def _truncated_bundle(folder: Path, client: Path) -> list[str]:
    shutil.copytree(client, folder / "bundle")
    with (folder / "bundle" / "weights.bin").open("r+b") as file:
        file.truncate(1000)
    return ["--bundle", str(folder / "bundle")]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda folder, _: _samples(folder, 63, 0),
            "shape (63,), model mlp:64-32-32-10 takes (64,)",
        ),
        (lambda folder, _: _samples(folder, 64, 10), "label 10 is outside 0..9"),
        (lambda folder, _: _samples(folder, 64, -1), "label -1 is outside 0..9"),
        (_other_bundle, "leave out --bundle to fetch it"),
        (_truncated_bundle, "weights.bin"),
        (lambda folder, _: ["--bundle", str(folder)], "manifest.json: cannot be read"),
    ],
    ids=["shape", "label", "negative label", "other bundle", "truncated bundle", "empty bundle"],
)
def test_a_device_that_does_not_fit_the_run_ends_with_3(
    bed, tmp_path, make: Callable[[Path, Path], list[str]], said
):
    child = bed.bench.device(tmp_path.name, bed.broker, bed.shard, *make(tmp_path, bed.client))
    assert child.finish(20.0) == 3, child.stderr
    lines = [line for line in child.stderr.splitlines() if line.startswith(ERROR)]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in child.stderr
    assert bed.server.code is None, bed.server.stderr


def test_two_devices_cannot_share_a_state_folder(tmp_path, bed):
    state = ["--fleet", "nobody", "--state", str(tmp_path / "state")]
    first = bed.bench.device("first", bed.broker, bed.shard, *state)
    first.wait_for("connected to")
    second = bed.bench.device("second", bed.broker, bed.shard, *state)
    assert second.finish(20.0) == 3
    assert "another device program uses it" in second.stderr
    assert first.code is None
    first.signal(signal.SIGINT)
    assert first.finish(10.0) == 130


def test_a_device_without_a_server_gives_up_with_6(bed):
    child = bed.bench.device("alone", bed.broker, bed.shard, "--fleet", "nobody", "--wait-s", "1")
    assert child.finish(20.0) == 6
    assert child.stderr.splitlines()[-1].startswith(f"{ERROR}nothing heard from a server of fleet")


def test_a_waiting_server_that_is_stopped_ends_with_130(bed):
    """The last test: it ends the server that the others had."""
    bed.server.signal(signal.SIGINT)
    assert bed.server.finish(15.0) == 130
    assert bed.server.stderr.splitlines()[-1] == f"{ERROR}interrupted"
    assert "Traceback" not in bed.server.stderr
