"""`musplit bench` on this machine: windows, meters, interruptions, the edge; small windows."""

from __future__ import annotations

import csv
import json
import signal
import struct
import subprocess
import sys
import time

import msgspec
import psutil
import pytest
from bench_support import ORIGIN
from click.testing import CliRunner
from harness import ROOT

from edge_client.bench import gpio
from edge_client.bench.conditions import Conditions, read_conditions, throttled
from edge_client.bench.evidence import Evidence
from edge_client.bench.prepare import Asked, begin, go_on
from edge_client.bench.records import Place
from edge_client.bench.report import write_report
from edge_client.bench.results import IterationEnergy
from edge_client.bench.runner import run_bench
from edge_client.errors import BenchError, EvidenceError, GpioError
from edge_client.power.choose import profile_here
from edge_client.power.meter import Reading
from export.exporter import export_model
from musplit.cli import main
from wire_protocol.energy import NoEnergy
from wire_protocol.errors import UnmeasuredError

QUIET = NoEnergy("no meter asked for")
ASKED = Asked(
    batch=4, directions=2, encoding="float32", threads=1, window_s=0.1, repeats=2, rate_hz=100.0,
    meter="model", gpio="",
)  # fmt: skip


class Constant:
    """A meter that always reads the same."""

    origin = msgspec.structs.replace(ORIGIN, rate_hz=100.0)

    def read(self):
        return Reading(time.monotonic(), 5.0)

    def close(self):
        pass


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export_model("mlp:16-8-4", "fc1", tmp_path_factory.mktemp("halves"), seed=0).client


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_measures_and_says_what_it_did_not(tmp_path, bundle):
    out = tmp_path / "evidence"
    result = invoke(
        "--bundle", bundle, "--meter", "model", "--window-s", 0.1, "--repeats", 2, "--batch", 4,
        "--directions", 2, "--profile", "laptop", "--out", out, "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    (cut,) = told["cuts"]
    assert 0 < cut["forward"]["median_s"] < cut["step"]["median_s"]
    phases = cut["step"]["phases"]
    assert 0 < phases["compute_s"] <= cut["step"]["median_s"] * 1.5
    assert cut["peak_rss_bytes"] > 20e6
    assert cut["activation_bytes"] == 4 * 4 * 8
    assert cut["frame_bytes"] > 3 * cut["activation_bytes"]
    assert cut["step"]["energy"]["type"] == "modelled"
    assert not told["reportable"]
    assert any("window below 10 s" in reason for reason in told["not_reportable"])
    assert {p.name for p in out.iterdir()} == {
        "MANIFEST.sha256", "configuration.toml", "environment.json", "raw", "results.json",
        "plots", "report.html",
    }  # fmt: skip


def test_required_measurements_are_asked_for_before_anything_is_written(tmp_path, bundle):
    for flags in (["--require-measured"], ["--mode", "energy"]):
        out = tmp_path / "evidence"
        result = invoke("--bundle", bundle, "--meter", "model", "--out", out, *flags)
        assert result.exit_code == UnmeasuredError.exit_code
        assert result.stderr.count("\n") == 1
        assert "measured energy is required" in result.stderr
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "--bundle DIR"),
        (("--bundle", "nowhere"), 3, "nowhere"),
        (("--bundle", "nowhere", "--cut", "fc1"), 2, "--model"),
        (("--resume", "nowhere"), 3, "MANIFEST.sha256"),
        (("--resume", "nowhere", "--window-s", "1", "--meter", "model"), 2, "--window-s"),
        (("--bundle", "nowhere", "--gpio", "gpiochip9:1"), 3, "--gpio gpiochip9:1"),
        (("--bundle", "nowhere", "--gpio", "../x:y"), 3, "write PIN"),
    ],
)
def test_wrong_requests_are_one_line(tmp_path, arguments, code, told):
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "evidence")]
    meter = [] if "--resume" in arguments else ["--meter", "model"]
    result = invoke(*arguments, *out, *meter)
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert result.stderr.splitlines()[-1].startswith("musplit: error: ")


def test_a_meter_gives_gross_and_net_from_the_windows_of_the_latency(tmp_path, bundle):
    asked = ASKED._replace(window_s=1.0)  # readings are late on a busy machine
    evidence = begin(tmp_path / "e", [bundle], Constant(), profile_here(), asked)
    run_bench(evidence, Constant(), lambda *_: None)
    results, _ = write_report(Evidence.open(tmp_path / "e"))
    (cut,) = results.cuts
    for figures in (cut.forward, cut.step):
        assert isinstance(figures.energy, IterationEnergy)
        assert figures.energy.energy_j == pytest.approx(5.0 * figures.mean_s, rel=0.02)
        assert figures.energy.net_j == pytest.approx(0.0, abs=0.02 * figures.energy.energy_j)
        assert figures.energy.origin == Constant.origin
    assert [w.name for w in cut.windows] == [
        "cut0-idle-0", "cut0-forward-0", "cut0-forward-1", "cut0-step-0", "cut0-step-1",
        "cut0-idle-1",
    ]  # fmt: skip
    for name in ("cut0-step-0", "cut0-idle-0"):
        window = evidence.window(Place(0, name.split("-")[1], 0))
        times_s, _ = evidence.power(Place(0, name.split("-")[1], 0))
        assert times_s[0] < window.begin_s < window.end_s < times_s[-1]


def test_what_is_done_stays_when_the_bench_is_interrupted(tmp_path, bundle):
    folder = tmp_path / "e"
    evidence = begin(folder, [bundle], QUIET, profile_here(), ASKED)

    def interrupt(_done_s, what):
        if what.endswith("step 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(evidence, None, interrupt)
    results, _ = write_report(Evidence.open(folder))
    assert any(r.startswith("interrupted: 2 of 4") for r in results.not_reportable)
    assert results.cuts[0].step is None
    before = {p.name: p.read_bytes() for p in (folder / "raw").iterdir()}
    result = CliRunner().invoke(main, ["bench", "--resume", str(folder), "--format", "json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["cuts"][0]["windows"]) == 4
    assert len(told["environments"]) == 2
    assert any("2 sessions" in note for note in told["notes"])
    after = {p.name: p.read_bytes() for p in (folder / "raw").iterdir()}
    assert before.items() < after.items()
    assert not [c for c in psutil.Process().children() if "edge_client.bench" in str(c.cmdline())]


def test_a_bench_does_not_go_on_with_another_machine_or_bundle(tmp_path, bundle):
    folder = tmp_path / "e"
    evidence = begin(folder, [bundle], QUIET, None, ASKED)
    other = msgspec.structs.replace(evidence.environments[0], processor="another one")
    with pytest.raises(EvidenceError, match="processor"):
        evidence.add_environment(other)
    cut = msgspec.structs.replace(evidence.configuration.cuts[0], bundle="00" * 32)
    configuration = msgspec.structs.replace(evidence.configuration, cuts=[cut])
    moved = Evidence.create(tmp_path / "f", configuration, evidence.environments[0])
    with pytest.raises(EvidenceError, match="not the bundle"):
        run_bench(moved, None, lambda *_: None)
    with pytest.raises(EvidenceError, match="not empty"):
        begin(folder, [bundle], QUIET, None, ASKED)


def test_a_bench_with_a_meter_does_not_go_on_without(tmp_path, bundle):
    begin(tmp_path / "e", [bundle], Constant(), None, ASKED)
    with pytest.raises(EvidenceError, match="was begun with a meter"):
        go_on(tmp_path / "e")


def test_a_measured_process_that_is_killed_is_told_with_its_signal(tmp_path, bundle):
    evidence = begin(tmp_path / "e", [bundle], QUIET, None, ASKED)

    def kill(_done_s, what):
        if what.endswith("forward 1"):
            for child in psutil.Process().children():
                if "edge_client.bench.child" in child.cmdline():
                    child.send_signal(signal.SIGILL)

    with pytest.raises(BenchError, match="SIGILL"):
        run_bench(evidence, None, kill)


def test_the_edge_is_high_in_every_window_and_only_there(tmp_path, bundle):
    edges = tmp_path / "edges.csv"
    asked = ASKED._replace(gpio=f"file:{edges}")
    evidence = begin(tmp_path / "e", [bundle], QUIET, None, asked)
    run_bench(evidence, None, lambda *_: None)
    with edges.open() as file:
        rows = [(float(r["t_s"]), int(r["level"])) for r in csv.DictReader(file)]
    assert [level for _, level in rows] == [1, 0] * 4
    windows = [
        evidence.window(Place(0, kind, repeat)) for kind in ("forward", "step") for repeat in (0, 1)
    ]
    for window, (up, _), (down, _) in zip(windows, rows[::2], rows[1::2], strict=True):
        assert up <= window.begin_s < window.end_s <= down
        assert down - up < window.seconds + 0.1


def test_a_file_that_holds_something_else_is_not_written_to(tmp_path):
    """The name may come with somebody's evidence, by --resume."""
    mine, edges = tmp_path / "mine", tmp_path / "edges.csv"
    mine.write_text("mine")
    with pytest.raises(GpioError, match="holds something else"):
        gpio.open_edge(f"file:{mine}")
    assert mine.read_text() == "mine"
    for _ in range(2):
        edge = gpio.open_edge(f"file:{edges}")
        edge.set(high=True)
        edge.close()
    assert edges.read_text().splitlines()[0] == "t_s,level"
    assert len(edges.read_text().splitlines()) == 3


def test_a_line_is_asked_for_as_the_kernel_wants_it():
    # linux/gpio.h on 64 bits: sizes and numbers as a C compiler gives them.
    assert gpio.GET_CHIP_INFO == 0x8044B401
    assert gpio.GET_LINE == 0xC250B407
    assert gpio.SET_VALUES == 0xC010B40F
    request = gpio.line_request(17)
    assert len(request) == 592
    assert struct.unpack_from("=I", request, 0) == (17,)
    assert request[256:288].rstrip(b"\0") == b"musplit-bench"
    assert struct.unpack_from("=Q", request, 288) == (8,)  # GPIO_V2_LINE_FLAG_OUTPUT
    assert struct.unpack_from("=I", request, 560) == (1,)  # num_lines
    assert gpio.line_values(high=True) == struct.pack("=QQ", 1, 1)


@pytest.mark.parametrize("spec", ["17", "gpiochip0:17", "x/y:1", "gpiochip0:5000", "pin"])
def test_a_line_that_is_not_there_is_one_line(tmp_path, spec):
    (tmp_path / "dev").mkdir()
    with pytest.raises(GpioError, match="--gpio") as caught:
        gpio.open_edge(spec, tmp_path)
    assert "\n" not in str(caught.value)


def test_conditions_of_a_recorded_tree(tmp_path):
    assert read_conditions(tmp_path) == Conditions(None, None, None)
    files = {
        "sys/class/thermal/thermal_zone0/temp": "48200\n",
        "sys/class/thermal/thermal_zone1/temp": "51000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1800000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_conditions(tmp_path) == Conditions(51.0, 1.2e9, "vcgencmd:0x50005")
    (tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled").unlink()
    count = tmp_path / "sys/class/hwmon/hwmon3/oc1_event_cnt"
    count.parent.mkdir(parents=True)
    count.write_text("12\n")
    assert read_conditions(tmp_path).throttle == "counter:12"


def test_throttle_words():
    assert throttled("vcgencmd:0x0", "vcgencmd:0x0") is False
    assert throttled("vcgencmd:0x0", "vcgencmd:0x2") is True
    assert throttled("vcgencmd:0x20000", "vcgencmd:0x20000") is True  # since boot counts too
    assert throttled("counter:2", "counter:2") is False
    assert throttled("counter:2", "counter:3") is True
    assert throttled(None, "counter:3") is None


def test_who_measures_does_not_load_what_is_measured():
    """A runtime that crashes at import ends the measured process, not the bench."""
    code = "import sys, edge_client.bench.runner; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
