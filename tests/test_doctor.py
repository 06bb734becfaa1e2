"""`musplit doctor`: each check on synthetic trees, and the command on this machine."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from harness import Bench, free_port

from edge_client.doctor.clock import check_clock, check_skew
from edge_client.doctor.findings import Board
from edge_client.doctor.network import Contact, check_broker
from edge_client.doctor.power import check_power
from edge_client.doctor.probe import DONE, Outcome
from edge_client.doctor.resources import check_disk, check_memory
from edge_client.doctor.runtime import check_runtime
from edge_client.doctor.system import System, check_system
from edge_client.state import StateStore
from firmware_profiles.catalogue import load_profile
from wire_protocol.mqtt import Address, TlsFiles

PI4 = load_profile("rpi-4b")
PI = System("aarch64", 64, (3, 11), "2.36")
A72 = "Features\t: fp asimd evtstrm crc32 cpuid\n"
FINE = Outcome(DONE, seconds=0.8)


@pytest.fixture
def write(tmp_path):
    """Write files of a synthetic tree: path=text, and give the board with the Pi 4's profile."""

    def _write(files, profile=PI4):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Board(tmp_path, profile)

    return _write


def by_check(findings):
    """Findings by check; a check that says something twice is a list's matter, none does."""
    found = list(findings)
    assert len({finding.check for finding in found}) == len(found)
    for finding in found:
        assert finding.what
        assert "\n" not in finding.what
        assert bool(finding.why) == bool(finding.remedy) == (finding.level != "ok")
    return {finding.check: finding for finding in found}


def whole_system(write):
    return write({
        "proc/cpuinfo": A72, "sys/devices/system/cpu/possible": "0-3",
        "sys/devices/system/cpu/present": "0-3",
    })  # fmt: skip


def test_a_board_as_its_profile_says_is_in_order(write):
    found = by_check(check_system(whole_system(write), PI))
    assert {f.level for f in found.values()} == {"ok"}
    assert set(found) == {"architecture", "python", "glibc", "cpu-features"}


@pytest.mark.parametrize(
    ("system", "check", "remedy"),
    [
        (System("aarch64", 32, (3, 11), "2.36"), "architecture", "64-bit image"),
        (System("armv7l", 32, (3, 11), "2.36"), "architecture", "64-bit image"),
        (System("x86_64", 64, (3, 11), "2.36"), "architecture", "profiles list"),
        (System("aarch64", 64, (3, 9), "2.31"), "python", "another Python"),
        (System("aarch64", 64, (3, 14), "2.41"), "python", "another Python"),
        (System("aarch64", 64, (3, 11), "2.27"), "glibc", "newer image"),
        (System("aarch64", 64, (3, 11), ""), "glibc", "with glibc"),
    ],
)
def test_a_system_without_wheels_is_an_error(write, system, check, remedy):
    finding = by_check(check_system(whole_system(write), system))[check]
    assert finding.level == "error"
    assert remedy in finding.remedy


def test_a_missing_instruction_is_an_error_a_missing_kernel_service_is_none(write):
    lacking = write({"proc/cpuinfo": "Features\t: fp crc32\nFeatures\t: fp asimd crc32\n"})
    finding = by_check(check_system(lacking, PI))["cpu-features"]
    assert finding.level == "error"
    assert finding.what == "the processor lacks asimd"


def test_hidden_lists_of_processors_are_a_warning(write):
    board = write({"proc/cpuinfo": A72})
    assert "ProcSubset" in by_check(check_system(board, PI))["cpu-lists"].remedy


# -- onnxruntime


def test_the_pin_that_runs_is_in_order(write):
    found = by_check(check_runtime(write({}), PI, "1.24.4", FINE))
    assert [f.level for f in found.values()] == ["ok", "ok"]


def test_the_pin_is_that_of_the_running_python(write):
    trixie = PI._replace(python=(3, 13))
    found = by_check(check_runtime(write({}), trixie, "1.27.0", FINE))
    assert found["onnxruntime-pin"].level == "ok"


def test_a_crash_names_signal_version_and_remedy(write):
    died = Outcome("import onnxruntime", signal=signal.SIGILL)
    finding = by_check(check_runtime(write({}), PI, "1.21.0", died))["onnxruntime"]
    assert finding.level == "error"
    assert "1.21.0 died of SIGILL (signal 4) at 'import onnxruntime'" in finding.what
    assert "known: SIGILL" in finding.why
    assert "pip install onnxruntime==1.24.4" in finding.remedy


def test_a_crash_without_a_profile_names_the_pins_of_this_processor(write):
    died = Outcome("run a model", signal=signal.SIGSEGV, said="oh")
    finding = by_check(check_runtime(write({}, None), PI, "1.30.0", died))["onnxruntime"]
    assert "SIGSEGV" in finding.what
    assert finding.why == "it said: oh"
    assert "onnxruntime==1.24.4" in finding.remedy


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome("run a model", timed_out=True, signal=9, seconds=180.0), "hung"),
        (Outcome("load a model", exit_code=1, said="Fail: no"), "failed at 'load a model'"),
        (None, "is not installed"),
    ],
)
def test_a_runtime_that_hangs_fails_or_is_absent_is_an_error(write, outcome, told):
    installed = "1.24.4" if outcome else None
    finding = by_check(check_runtime(write({}), PI, installed, outcome))["onnxruntime"]
    assert finding.level == "error"
    assert told in finding.what


def test_versions_that_run_but_were_not_tried_or_are_to_be_avoided_are_warnings(write):
    found = by_check(check_runtime(write({}), PI, "1.32.0", FINE))
    assert [f.level for f in found.values()] == ["ok", "warning"]
    found = by_check(check_runtime(write({}), PI, "1.22.0", FINE))
    assert found["onnxruntime"].level == "warning"


# -- power, temperature, room


@pytest.mark.parametrize(
    ("bits", "level", "told"),
    [
        ("0", "ok", "no flag"),
        ("1", "error", "now: under-voltage"),
        ("50005", "error", "now: under-voltage, throttled"),
        ("50000", "warning", "since boot, not now: under-voltage, throttled"),
        ("80008", "error", "soft temperature limit"),
    ],
)
def test_throttling_flags_of_a_raspberry_pi(write, bits, level, told):
    board = write({"sys/devices/platform/soc/soc:firmware/get_throttled": f"{bits}\n"})
    finding = by_check(check_power(board))["throttling"]
    assert (finding.level, told in finding.what) == (level, True), finding


def test_over_current_events_of_a_jetson(write):
    nano = load_profile("jetson-orin-nano")
    files = {
        "sys/class/hwmon/hwmon1/oc1_event_cnt": "0",
        "sys/class/hwmon/hwmon1/oc2_event_cnt": "3",
    }
    finding = by_check(check_power(write(files, nano)))["throttling"]
    assert (finding.level, "oc2_event_cnt 3" in finding.what) == ("warning", True)


def test_a_board_that_tells_no_flags_is_a_warning_a_laptop_is_not(write):
    assert by_check(check_power(write({})))["throttling"].level == "warning"
    laptop = load_profile("laptop")
    assert by_check(check_power(write({}, laptop)))["throttling"].level == "ok"


@pytest.mark.parametrize(("milli_c", "level"), [("45000", "ok"), ("72500", "warning"),
                                                ("81000", "error")])  # fmt: skip
def test_the_hottest_zone_counts(write, milli_c, level):
    board = write({
        "sys/class/thermal/thermal_zone0/temp": "30000",
        "sys/class/thermal/thermal_zone1/temp": milli_c,
        "sys/class/thermal/thermal_zone1/type": "cpu-thermal",
    })  # fmt: skip
    finding = by_check(check_power(board))["temperature"]
    assert (finding.level, "cpu-thermal" in finding.what) == (level, True)


def test_no_power_sensor_is_a_warning_with_its_reason(write):
    finding = by_check(check_power(write({})))["power-sensor"]
    assert finding.level == "warning"
    assert "modelled" in finding.why


def meminfo(total_kb, available_kb):
    return {"proc/meminfo": f"MemTotal: {total_kb} kB\nMemAvailable: {available_kb} kB\n\n"}


def test_memory_against_the_profile_and_the_program(write):
    levels = {
        name: finding.level
        for name, finding in by_check(
            check_memory(write(meminfo(3_884_000, 3_000_000), load_profile("rpi-4b:4096")))
        ).items()
    }  # fmt: skip
    assert levels == {"memory-profile": "ok", "memory": "ok"}
    small = by_check(check_memory(write(meminfo(428_000, 90_000))))
    assert {name: f.level for name, f in small.items()} == {
        "memory-profile": "warning", "memory": "error",
    }  # fmt: skip


def test_room_on_the_disk_is_of_the_nearest_folder_that_exists(tmp_path):
    finding = by_check(check_disk(tmp_path / "not" / "yet"))["disk"]
    assert finding.what.endswith(f"free in {tmp_path}")


# -- clock


def test_a_clock_before_the_system_s_files_is_an_error(write):
    board = write({})
    assert by_check(check_clock(board, 0.0))["clock"].level == "error"
    now_s = datetime.now(UTC).timestamp() + 60
    assert by_check(check_clock(board, now_s))["clock"].level == "warning"
    board = write({"run/systemd/timesync/synchronized": ""})
    assert by_check(check_clock(board, now_s))["clock"].level == "ok"


@pytest.mark.parametrize(
    ("off_s", "level"), [(0.0, "ok"), (-10.0, "warning"), (3600.0, "error"), (None, "warning")]
)
def test_skew_is_taken_from_the_server_s_date(off_s, level):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response_only(404)
            if off_s is not None:
                at = datetime.now(UTC) + timedelta(seconds=off_s)
                self.send_header("Date", at.strftime("%a, %d %b %Y %H:%M:%S GMT"))
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            found = by_check(check_skew(f"http://127.0.0.1:{server.server_port}", None))
        finally:
            server.shutdown()
            thread.join()
    assert found["clock-skew"].level == level


def test_a_server_that_cannot_be_asked_is_a_warning():
    for url in ("https://127.0.0.1:1", "ftp://somewhere", "nonsense"):
        assert by_check(check_skew(url, None))["clock-skew"].level == "warning"


# -- the broker and the command


def test_a_broker_tells_its_packet_limit_and_an_absent_one_is_an_error(tmp_path):
    with Bench(tmp_path) as bench:
        address = bench.broker()
        found = by_check(check_broker(Contact(address, None, "lab", 5.0, tmp_path)))
        assert found["broker"].level == "ok"
        assert found["packet-limit"].level == "ok"
    absent = Address("127.0.0.1", free_port())
    finding = by_check(check_broker(Contact(absent, None, "lab", 0.2, tmp_path)))["broker"]
    assert finding.level == "error"
    assert str(absent) in finding.what


def test_an_identity_that_cannot_be_used_is_the_brokers_finding_too(tmp_path):
    contact = Contact(
        Address("127.0.0.1", free_port()), TlsFiles.in_folder(tmp_path), "lab", 0.2, tmp_path
    )
    finding = by_check(check_broker(contact))["broker"]
    assert finding.level == "error"
    assert finding.remedy.startswith("enrol this machine")


def test_with_tls_a_device_program_that_runs_is_left_alone(tmp_path):
    store = StateStore(tmp_path / "pi-1")
    absent, tls = Address("127.0.0.1", free_port()), TlsFiles.in_folder(tmp_path)
    try:
        contact = Contact(absent, tls, "lab", 0.2, tmp_path)
        finding = by_check(check_broker(contact))["broker"]
    finally:
        store.close()
    assert finding.level == "ok"
    assert "not asked" in finding.what


def test_the_command_runs_onnxruntime_in_a_child_and_gives_json(tmp_path):
    with Bench(tmp_path) as bench:
        child = bench.run("doctor", "--format", "json")
    assert child.code == 0, child.stderr
    report = json.loads(child.stdout)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert "runs a model" in found["onnxruntime"]["what"]
    assert report["errors"] == 0
    assert report["ok"] + report["warnings"] == len(report["findings"])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "died of SIGILL (signal 4)"),
        ("import os; os.abort()", "died of SIGABRT (signal 6)"),
        ("raise ImportError('libgomp.so.1 is missing')", "failed at 'import onnxruntime'"),
    ],
)
def test_a_runtime_that_dies_at_import_is_a_finding_not_a_death(tmp_path, body, told):
    """A module of onnxruntime's name stands in for a wheel that crashes."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "onnxruntime.py").write_text(body)
    with Bench(tmp_path) as bench:
        child = bench.run("doctor", env={"PYTHONPATH": _first(tmp_path / "broken")})
    assert child.code == 1, child.stderr
    line = next(line for line in child.stdout.splitlines() if line.startswith("ERROR"))
    assert told in line
    assert "disk" in child.stdout  # the checks after it


def test_a_numpy_that_dies_is_a_finding_and_ends_the_checks(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "numpy.py").write_text("import os; os.kill(os.getpid(), 4)")
    with Bench(tmp_path) as bench:
        child = bench.run("doctor", env={"PYTHONPATH": _first(tmp_path / "broken")})
    assert child.code == 1, child.stderr
    assert "died of SIGILL (signal 4) at 'import numpy'" in child.stdout
    assert "disk" not in child.stdout


def test_beyond_loopback_the_command_wants_a_certificate_or_insecure(tmp_path):
    with Bench(tmp_path) as bench:
        child = bench.run("doctor", "--broker", "192.0.2.1")
    assert child.code == 3
    assert "--insecure" in child.stderr


def _first(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
