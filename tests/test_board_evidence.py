"""A bench's evidence: what follows from raw samples, who notices alteration, the page."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import msgspec
import pytest
from bench_support import CONFIGURATION, CUT, ENVIRONMENT, make_evidence
from click.testing import CliRunner

from edge_client.bench.compute import compute_results
from edge_client.bench.evidence import Evidence
from edge_client.bench.report import write_report
from edge_client.errors import EvidenceError
from firmware_profiles.catalogue import load_profile
from musplit.cli import main
from wire_protocol.energy import NoEnergy


def derived(folder):
    names = ("results.json", "report.html", "plots/*")
    return {p.relative_to(folder): p.read_bytes() for n in names for p in folder.glob(n)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "e"
    make_evidence(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the evidence that a whole bench leaves."""
    return shutil.copytree(whole, tmp_path / "e")


def reseal(folder):
    """The manifest of what is there now: a damaged file that nobody altered since."""
    lines = (folder / "MANIFEST.sha256").read_text().splitlines()
    names = [line.partition("  ")[2] for line in lines]
    text = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    (folder / "MANIFEST.sha256").write_text(text)


def test_known_windows_give_known_figures(whole):
    results = compute_results(Evidence.open(whole))
    (cut,) = results.cuts
    assert results.reportable
    assert not results.not_reportable
    assert cut.forward.median_s == pytest.approx(0.01)
    assert cut.forward.p90_s == pytest.approx(0.0102, rel=0.01)  # the slowest window's plain ones
    assert cut.forward.spread_relative == pytest.approx(0.04)
    assert cut.step.phases.compute_s == pytest.approx(0.25 * 0.9)
    assert cut.forward.energy.energy_j == pytest.approx(4.0 * 0.01, rel=1e-6)
    assert cut.forward.energy.net_j == pytest.approx(2.0 * 0.01, rel=1e-6)
    assert cut.step.energy.energy_j == pytest.approx(6.0 * 0.25, rel=1e-6)
    assert cut.forward.energy.net_uncertainty_j > cut.forward.energy.uncertainty_j
    assert cut.step.energy.uncertainty_j == pytest.approx(0.01 * 6.0 * 0.25, rel=0.01)
    assert cut.idle_w == pytest.approx(2.0)
    assert cut.activation_bytes == 4 * 32 * 32
    assert cut.peak_rss_bytes == 61_000_000


def test_derived_files_are_made_again_byte_for_byte(tmp_path, folder):
    write_report(Evidence.open(folder))
    first = derived(folder)
    assert len(first) >= 8
    for name in first:
        (folder / name).unlink()
    shutil.rmtree(folder / "plots")
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    result = CliRunner().invoke(main, ["report", str(moved)])
    assert result.exit_code == 0, result.output
    assert derived(moved) == first
    again = CliRunner().invoke(main, ["report", str(moved), "--format", "json"])
    assert set(json.loads(again.stdout)["files"].values()) == {"unchanged"}


def test_an_altered_result_is_noticed_and_set_right(folder):
    write_report(Evidence.open(folder))
    first = (folder / "results.json").read_bytes()
    (folder / "results.json").write_bytes(first.replace(b'"median_s": 0.01', b'"median_s": 0.001'))
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0
    assert f"rewritten: {folder / 'results.json'}" in result.stderr
    assert (folder / "results.json").read_bytes() == first


@pytest.mark.parametrize(
    "name", ["raw/cut0-step-2.power.csv", "raw/cut0-forward-0.window.csv", "environment.json",
             "configuration.toml"],
)  # fmt: skip
def test_an_altered_raw_file_is_named(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes().replace(b"6", b"5"))
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 3
    assert result.stderr.startswith(f"musplit: error: {folder / name}: altered")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("raw/cut0-step-2.power.csv", b"t_s,power_w\n1,2\n1,3\n", "ascend"),
        ("raw/cut0-step-2.power.csv", b"t_s,power_w\n1,nan\n", "not finite"),
        ("raw/cut0-step-2.power.csv", b"t_s,power_w\n1\n", "short"),
        ("raw/cut0-step-2.power.csv", b"time,power\n", "columns"),
        ("raw/cut0-step-2.latency.csv", b"\xff", "not such a table"),
        ("raw/cut0-step-2.latency.csv", b"number,seconds,perturb_s,forward_s,encode_s\n", "iterat"),
        ("raw/cut0-step-2.latency.csv",
         b"number,seconds,perturb_s,forward_s,encode_s\n0,-1,0,0,0\n", "negative"),
        ("raw/cut0-step-2.window.csv", b"begin_s\n1\n", "missing"),
        ("raw/cut0-step-2.window.csv", b"", "one row"),
        ("environment.json", b"{}", "missing"),
        ("environment.json", b"\xff\xff", "environment.json"),
        ("configuration.toml", b"format = ", "configuration.toml"),
        ("configuration.toml", b'format = "other/9"\n', "not of format"),
    ],
)  # fmt: skip
def test_a_damaged_raw_file_is_one_line(folder, name, data, told):
    (folder / name).write_bytes(data)
    reseal(folder)
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 3, result.output
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert name.rpartition("/")[2].partition(".")[0] in result.stderr


@pytest.mark.parametrize(
    "line", ["x", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 64}  /etc/passwd", "", "é"]
)
def test_a_damaged_manifest_is_one_line(folder, line):
    manifest = folder / "MANIFEST.sha256"
    manifest.write_text(f"{line}\n" + manifest.read_text(), encoding="utf-8")
    with pytest.raises(EvidenceError, match=r"MANIFEST\.sha256"):
        Evidence.open(folder)


def test_links_of_a_strangers_evidence_are_not_followed(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in ("report.new", "results.new"):
        (folder / name).symlink_to(mine)
    write_report(Evidence.open(folder))
    assert mine.read_text() == "mine"
    shutil.rmtree(folder / "plots")
    (folder / "plots").symlink_to(tmp_path)
    with pytest.raises(EvidenceError, match="plots: is a link"):
        Evidence.open(folder)
    (folder / "plots").unlink()
    for name in ("environment.json", "MANIFEST.sha256"):
        (folder / name).rename(tmp_path / name)
        os.mkfifo(folder / name)
        with pytest.raises(EvidenceError, match=f"{name}: is no plain file"):
            Evidence.open(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_a_missing_file_and_a_folder_that_is_none(tmp_path, folder):
    (folder / "raw" / "cut0-idle-0.power.csv").unlink()
    for what, told in ((folder, "cannot be read"), (tmp_path / "none", "musplit bench --out")):
        result = CliRunner().invoke(main, ["report", str(what)])
        assert result.exit_code == 3
        assert told in result.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"throttle_after": "vcgencmd:0x50000"}, "throttled"),
        ({"throttle_before": "vcgencmd:0x4"}, "throttled"),
        ({"throttle_before": "counter:3", "throttle_after": "counter:4"}, "throttled"),
        ({"other_cpu_s": 3.0}, "other programs computed"),
        ({"only": 7}, "interrupted: 7 of 12"),
        ({"gap_in": "cut0-step-1"}, "no energy in cut0-step-1"),
        ({"configuration": msgspec.structs.replace(CONFIGURATION, window_s=5.0)}, "window below"),
        ({"configuration": msgspec.structs.replace(CONFIGURATION, repeats=3)}, "fewer than 5"),
    ],
)
def test_what_must_not_be_reported_says_so(tmp_path, changes, told):
    results, _ = write_report(make_evidence(tmp_path / "e", **changes))
    assert not results.reportable
    assert told in " ".join(results.not_reportable)
    assert "Not reportable" in (tmp_path / "e" / "report.html").read_text()


def test_throttle_flags_that_do_not_move_are_fine_as_counters_only(tmp_path):
    calm = {"throttle_before": "counter:7", "throttle_after": "counter:7"}
    assert compute_results(make_evidence(tmp_path / "e", **calm)).reportable
    silent = {"throttle_before": None, "throttle_after": None}
    results = compute_results(make_evidence(tmp_path / "f", **silent))
    assert results.reportable
    assert any("does not tell whether it throttled" in note for note in results.notes)


def test_a_lost_sensor_is_not_replaced_by_the_model(tmp_path):
    results = compute_results(
        make_evidence(tmp_path / "e", configuration=msgspec.structs.replace(
            CONFIGURATION, repeats=1), gap_in="cut0-step-0")
    )  # fmt: skip
    assert isinstance(results.cuts[0].step.energy, NoEnergy)
    assert "without a reading" in results.cuts[0].step.energy.reason


def test_without_a_meter_energy_is_modelled_in_fields_of_its_own(tmp_path):
    results, _ = write_report(make_evidence(
        tmp_path / "e", configuration=msgspec.structs.replace(CONFIGURATION, mode="performance"),
        environment=msgspec.structs.replace(ENVIRONMENT, meter=None, meter_reason="no sensor"),
    ))  # fmt: skip
    energy = json.loads((tmp_path / "e" / "results.json").read_text())["cuts"][0]["step"]["energy"]
    assert energy["type"] == "modelled"
    assert energy["modelled_low_j"] < energy["modelled_j"] < energy["modelled_high_j"]
    assert energy["modelled_j"] == pytest.approx(6.4 * 0.25)
    assert not [field for field in energy if field.endswith("energy_j")]
    assert "no sensor" in " ".join(results.notes)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href", "action", "style"} and v]


def test_the_page_stands_alone_and_escapes_what_it_is_told(tmp_path):
    evil = '<script>alert("x")</script>&"\'<img src=http://example.org/x>'
    cut = msgspec.structs.replace(CUT, model=evil, cut=evil)
    folder = tmp_path / "e"
    write_report(make_evidence(
        folder, configuration=msgspec.structs.replace(CONFIGURATION, cuts=[cut], profile=evil),
        environment=msgspec.structs.replace(ENVIRONMENT, board=evil, system=evil),
    ))  # fmt: skip
    page = Tags()
    page.feed((folder / "report.html").read_text())
    assert not {"script", "img", "link", "iframe", "object"} & set(page.found)
    assert page.found.count("svg") >= 6
    assert not [link for link in page.links if "http" in link or "url(" in link]
    for plot in (folder / "plots").iterdir():
        ET.fromstring(plot.read_text())


def test_the_manifest_is_what_sha256sum_reads(tmp_path):
    folder = tmp_path / "e"
    evidence = make_evidence(folder, only=2)
    for line in (folder / "MANIFEST.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    whole = hashlib.sha256((folder / "MANIFEST.sha256").read_bytes()).hexdigest()
    assert evidence.digest == whole == Evidence.open(folder).digest


def test_calibrate_writes_a_profile_that_names_its_evidence(tmp_path, folder):
    evidence, out = Evidence.open(folder), tmp_path / "mine.toml"
    command = ["calibrate", str(folder), "--profile", "rpi-4b", "--out", str(out)]
    result = CliRunner().invoke(main, [*command, "--format", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["reportable"]
    profile = tomllib.loads(out.read_text())
    (entry,) = profile["speed"]["calibrated"]
    assert entry["step_s"] == pytest.approx(0.25 * 0.9)
    assert (entry["graph"], entry["batch"], entry["threads"]) == (CUT.graph, 32, 4)
    for watts, value_w in (("idle", 2.0), ("load", 6.0)):
        assert profile["power"][watts]["value_w"] == pytest.approx(value_w)
        assert profile["power"][watts]["confidence"] == "measured"
        assert evidence.digest in profile["power"][watts]["source"]
        assert "2026-07-01" in profile["power"][watts]["source"]
    # Its own output is a profile like any other: the same again is the same.
    first = out.read_bytes()
    command[3] = str(out)
    assert CliRunner().invoke(main, command).exit_code == 0
    assert out.read_bytes() == first
    assert load_profile(str(out)).speed.calibrated[0].source == entry["source"]


@pytest.mark.parametrize(
    ("changes", "profile", "told"),
    [
        ({}, "laptop", "aarch64"),
        ({"only": 6}, "rpi-4b", "no window of steps"),
        ({}, "no-such-board", "no-such-board"),
    ],
)
def test_calibrate_refuses_in_one_line(tmp_path, changes, profile, told):
    make_evidence(tmp_path / "e", **changes)
    out = tmp_path / "mine.toml"
    result = CliRunner().invoke(
        main, ["calibrate", str(tmp_path / "e"), "--profile", profile, "--out", str(out)]
    )
    assert result.exit_code == 3
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert not out.exists()
