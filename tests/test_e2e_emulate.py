"""`musplit emulate` as a user runs it: broker, server and devices as processes, then `replay`."""

from __future__ import annotations

import contextlib
import json
import shutil
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import TINY, Bench, Child, Digests, flags, here, read_jsonl, undisturbed

from server_node.journal import RoundClosed, read_journal

SUMMARY_FIELDS = (
    "accuracy", "accuracy_frozen_client", "rounds", "tau", "clients", "seed", "seconds",
    "server_busy_while_waiting_s", "bytes_up", "bytes_down", "bytes_up_per_client_round",
    "server_steps", "client_weights_sha256", "server_weights_sha256", "config_sha256", "versions",
)  # fmt: skip
RUN_FILES = (
    "config.toml", "rounds.csv", "rounds.jsonl", "devices.csv", "devices.jsonl", "journal.bin",
    "checkpoint.npz", "trace.json", "accuracy.png", "summary.json",
)  # fmt: skip


class Emulated(NamedTuple):
    """A finished `emulate` with its run folder, and the processes that it left behind."""

    child: Child
    run: Path
    code: int
    left_behind: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return loaded


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Emulated]:
    """One run over each broker, at the same time, with every option of the output used once."""
    folder = tmp_path_factory.mktemp("emulate")
    (folder / "no-programs").mkdir()
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "amqtt": (
            ["--require", "accuracy>=0.0", "--require", "accuracy>=1.01",
             "--junit", str(folder / "report" / "junit.xml")],
            {"PATH": str(folder / "no-programs")},
        ),
    }  # fmt: skip
    if shutil.which("mosquitto"):
        commands["mosquitto"] = (["--format", "json", "--require", "accuracy>=0.0"], {})
    with contextlib.ExitStack() as stack:
        benches = {name: stack.enter_context(Bench(folder / name)) for name in commands}
        started = {
            name: benches[name].start(
                "emulate", "--out", str(folder / name / "run"), *flags(TINY), *options, env=env
            )
            for name, (options, env) in commands.items()
        }
        return {
            name: Emulated(
                child, folder / name / "run", child.finish(), benches[name].left_behind()
            )
            for name, child in started.items()
        }


@pytest.fixture(scope="module")
def mosquitto(runs) -> Emulated:
    """JSON output, and a requirement that holds."""
    if "mosquitto" not in runs:
        pytest.skip("mosquitto is not on PATH")
    finished: Emulated = runs["mosquitto"]
    return finished


@pytest.fixture(scope="module")
def amqtt(runs) -> Emulated:
    """Text output, a JUnit report, and a requirement that cannot hold."""
    finished: Emulated = runs["amqtt"]
    return finished


@pytest.fixture(scope="module", params=["mosquitto", "amqtt"])
def emulated(request) -> Emulated:
    """Either run."""
    finished: Emulated = request.getfixturevalue(request.param)
    return finished


def test_a_run_whose_requirements_hold_ends_with_0(mosquitto):
    assert mosquitto.code == 0, mosquitto.child.stderr
    assert "holds: accuracy>=0.0" in mosquitto.child.stderr


def test_a_requirement_that_does_not_hold_ends_with_1_and_is_named(amqtt):
    assert amqtt.code == 1, amqtt.child.stderr
    assert "FAILED: accuracy>=1.01" in amqtt.child.stderr
    assert "holds: accuracy>=0.0" in amqtt.child.stderr
    assert "Traceback" not in amqtt.child.stderr


def test_each_broker_is_the_one_that_path_offers(mosquitto, amqtt):
    assert mosquitto.summary["broker_protocol"] == "MQTT 5"
    assert amqtt.summary["broker_protocol"] == "MQTT 3.1.1"


def test_the_digests_are_those_of_the_fleet_in_one_process(emulated):
    """Processes, MQTT and the choice of broker change no bit."""
    assert Digests.of(emulated.summary) == undisturbed(TINY)


def test_the_summary_has_every_promised_field_with_the_configured_values(emulated):
    summary = emulated.summary
    assert set(SUMMARY_FIELDS) <= set(summary)
    assert (summary["rounds"], summary["tau"], summary["clients"], summary["seed"]) == (6, 2, 2, 0)
    assert summary["server_steps"] == 6 * 2 * 2
    assert summary["outcome"] == "complete"
    assert 0.0 <= summary["accuracy"] <= 1.0
    assert summary["accuracy_frozen_client"] is None
    assert summary["accuracy_frozen_client_reason"] == "evaluation.control is off"
    per_round = summary["bytes_up"] / 12
    assert summary["bytes_up_per_client_round"] == pytest.approx(per_round, rel=0.01)
    # A device-round carries one activation and K differences of 8 x 32 float32.
    assert per_round > 5 * 8 * 32 * 4
    assert {"python", "torch", "numpy", "onnxruntime"} <= set(summary["versions"])


def test_the_run_folder_holds_every_promised_file(emulated):
    missing = [name for name in RUN_FILES if not (emulated.run / name).is_file()]
    assert missing == []
    assert tomllib.loads((emulated.run / "config.toml").read_text())["run"]["rounds"] == 6
    assert (emulated.run / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("table", ["rounds", "devices"])
def test_csv_and_json_lines_have_the_same_rows(emulated, table):
    lines = read_jsonl(emulated.run / f"{table}.jsonl")
    header, *rows = (emulated.run / f"{table}.csv").read_text().splitlines()
    names = header.split(",")
    # What is nested in a JSON line, a device's energy, has more cells at the end of the row.
    nested = any(isinstance(value, dict) for value in lines[0].values())
    assert names[: len(lines[0])] == list(lines[0])
    assert (len(names) > len(lines[0])) == nested
    assert [row.split(",")[0] for row in rows] == [str(next(iter(r.values()))) for r in lines]
    assert len(rows) >= 6


def test_the_trace_is_an_array_of_chrome_trace_events(emulated):
    events = json.loads((emulated.run / "trace.json").read_text())
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["ph"] for event in events} == {"M", "X", "i", "C"}
    assert all(event["name"].startswith("power ") for event in events if event["ph"] == "C")
    assert sum(event["name"] == "step" for event in spans) == 6 * 2 * 2
    assert all(event["dur"] >= 0 and event["ts"] > 0 for event in spans)


def test_json_output_is_one_object_on_stdout(mosquitto):
    printed = json.loads(mosquitto.child.stdout)
    assert printed.pop("folder") == str(mosquitto.run)
    assert printed == mosquitto.summary
    assert len(mosquitto.child.stdout.splitlines()) == 1


def test_text_output_shows_accuracy_control_and_folder(amqtt):
    shown = amqtt.child.stdout
    assert f"{100 * amqtt.summary['accuracy']:.1f} %" in shown
    assert "frozen client" in shown
    assert f"musplit replay {amqtt.run}" in shown


def test_junit_report_has_a_case_a_requirement(amqtt):
    suite = ET.parse(amqtt.run.parents[1] / "report" / "junit.xml").getroot()
    failed = {case.get("name"): case.find("failure") is not None for case in suite}
    assert failed == {"accuracy>=0.0": False, "accuracy>=1.01": True}
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")


def test_no_process_is_left_behind(emulated):
    assert emulated.left_behind == []


def replay(run: Path) -> tuple[int, dict[str, Any]]:
    done = here("replay", str(run), "--format", "json")
    return done.exit_code, json.loads(done.stdout)


def test_replay_of_a_run_gives_its_digests(amqtt):
    code, result = replay(amqtt.run)
    assert (code, result["rounds"], result["matches"], result["complete"]) == (0, 6, True, True)
    assert Digests.of(result) == Digests.of(amqtt.summary)


def copy_essentials(run: Path, target: Path) -> Path:
    """Halves and journal, nothing else."""
    target.mkdir()
    for half in ("client", "server"):
        shutil.copytree(run / half, target / half)
    shutil.copy(run / "journal.bin", target)
    return target


def test_replay_needs_halves_and_journal_only(amqtt, tmp_path):
    code, result = replay(copy_essentials(amqtt.run, tmp_path / "copy"))
    assert code == 0
    assert Digests.of(result) == Digests.of(amqtt.summary)


@pytest.mark.parametrize("half", ["client_scalars", "server_scalars"])
def test_replay_of_a_journal_with_one_altered_byte_ends_with_1(amqtt, tmp_path, half):
    path = copy_essentials(amqtt.run, tmp_path / "copy") / "journal.bin"
    rounds = [r for r in read_journal(path).records if isinstance(r, RoundClosed)]
    scalars = getattr(rounds[1].shares[0], half)
    data = bytearray(path.read_bytes())
    assert data.count(scalars) == 1
    data[data.index(scalars) + 3] ^= 0x80  # the sign of the first float32
    path.write_bytes(data)
    code, result = replay(path.parent)
    assert (code, result["matches"]) == (1, False)
    assert Digests.of(result) != Digests.of(amqtt.summary)
