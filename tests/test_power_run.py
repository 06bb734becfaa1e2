"""The energy of a run: devices' reports added up, and what the commands do where no meter is."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from click.testing import CliRunner
from harness import TINY, Bench, make_shards, read_jsonl
from msgspec import structs
from power_support import origin

from edge_client.power.choose import EnergyChoice, energy_source, profile_here
from edge_client.power.find import MeterOptions
from musplit.cli import main
from server_node.energy import Energies, SoFar, Total, Work, energy_fields, spent
from wire_protocol.energy import MeasuredByPhase, ModelledByPhase, NoEnergy
from wire_protocol.errors import UnmeasuredError
from wire_protocol.messages import Report

PHASES = ("perturb", "forward", "encode", "radio", "replay", "wait")
MEASURED = MeasuredByPhase(
    energy_j=21.0, perturb_energy_j=1.0, forward_energy_j=2.0, encode_energy_j=3.0,
    radio_energy_j=4.0, replay_energy_j=5.0, wait_energy_j=6.0, idle_w=1.5, uncertainty_j=0.5,
    window_s=10.0, samples=100, largest_gap_s=0.1, gap_s=0.1, origin=origin(),
)  # fmt: skip
MODELLED = ModelledByPhase(
    modelled_j=21.0, modelled_low_j=12.6, modelled_high_j=29.4, perturb_modelled_j=1.0,
    forward_modelled_j=2.0, encode_modelled_j=3.0, radio_modelled_j=4.0, replay_modelled_j=5.0,
    wait_modelled_j=6.0, window_s=10.0, boundary="wall-ac", model="m", source="s",
)  # fmt: skip


def report(energy, epoch=1) -> Report:
    numbers = dict.fromkeys(Report.__struct_fields__, 0)
    return Report(**(numbers | {"epoch": epoch, "energy": energy}))


def energies(*accounts) -> Energies:
    """Of devices 0, 1, .., each with the accounts of its sessions."""
    total = Energies()
    for index, sessions in enumerate(accounts):
        for epoch, energy in enumerate(sessions):
            total.add(index, f"pi-{index}", report(energy, epoch))
    return total


def test_sessions_and_devices_add_up():
    total = energies([MEASURED, MEASURED], [MEASURED]).measured()
    assert isinstance(total, Total)
    assert total.joules == 63.0
    assert (total.low_j, total.high_j) == (61.5, 64.5)
    assert total.net_j == 63.0 - 3 * 15.0
    assert sum(total.by_phase.values()) == 63.0


def test_a_session_counts_once_by_its_last_report():
    total = Energies()
    for joules in (5.0, 21.0):
        total.add(0, "pi-0", report(structs.replace(MEASURED, energy_j=joules)))
    assert total.measured().joules == 21.0


def test_measured_and_modelled_are_never_added():
    mixed = energies([MEASURED], [MODELLED])
    assert mixed.measured() == "not measured: 1 of 2 devices, the first is pi-1: it is modelled"
    assert mixed.modelled() == "not modelled: 1 of 2 devices, the first is pi-0: it is measured"


def test_a_device_without_a_figure_leaves_none_for_all():
    assert "pi-1: unplugged" in energies([MEASURED], [NoEnergy("unplugged")]).measured()
    assert energies().measured() == "no device has reported"


def test_boundaries_are_never_added():
    wall = structs.replace(MEASURED, origin=origin(boundary="wall-ac"))
    assert "different boundaries: board-dc, wall-ac" in energies([MEASURED], [wall]).measured()


def test_net_energy_needs_idle_of_every_device():
    total = energies([MEASURED], [structs.replace(MEASURED, idle_w=None)]).measured()
    assert total.joules == 42.0
    assert total.net_j is None


def test_fields_of_the_summary():
    so_far = [SoFar(5.0, None), SoFar(11.0, None), SoFar(17.0, None)]
    fields = energy_fields(energies([MEASURED]), Work(3, 60, 0, "accuracy 0.5"), so_far)
    assert fields["measured_energy_j"] == 21.0
    assert fields["measured_energy_per_round_j"] == 7.0
    assert fields["measured_energy_per_sample_j"] == 0.35
    assert fields["measured_energy_to_target_j"] == 11.0  # reports of round 0 come after its row
    assert fields["modelled_energy_j"] is None
    assert fields["modelled_energy_reason"].startswith("not modelled")
    last = energy_fields(energies([MEASURED]), Work(3, 60, 2, "accuracy 0.5"), so_far)
    assert last["measured_energy_to_target_j"] == 21.0
    never = energy_fields(energies([MODELLED]), Work(3, 60, None, "not reached"), so_far)
    assert never["modelled_energy_to_target_j"] is None
    assert never["modelled_energy_to_target_reason"] == "not reached"


def test_between_two_reports():
    later = structs.replace(
        MEASURED, energy_j=31.0, forward_energy_j=12.0, window_s=12.0, samples=120
    )
    known = spent(MEASURED, later)
    assert known["measured_w"] == 5.0
    assert known["forward_measured_j"] == 10.0
    assert spent(MEASURED, structs.replace(later, gap_s=0.3)) == {}  # of 2 s
    assert spent(MEASURED, MODELLED) == {}
    assert spent(NoEnergy("too early"), later) == {}
    assert spent(None, MODELLED)["modelled_w"] == 2.1


# -- where no meter is


def test_the_source_says_what_it_is(tmp_path):
    said = []
    source = energy_source(EnergyChoice(), 1, said.append, tmp_path)
    assert isinstance(source.so_far(), ModelledByPhase)
    assert said[0].startswith("energy: modelled, not measured (no power sensor found")
    none = energy_source(EnergyChoice(MeterOptions("none")), 1, said.append, tmp_path)
    assert none.so_far() == NoEnergy("no meter asked for (--meter none)")
    with pytest.raises(UnmeasuredError, match="not measured here: no power sensor found"):
        energy_source(EnergyChoice(require_measured=True), 1, said.append, tmp_path)


def test_a_board_is_known_by_what_its_firmware_says(tmp_path):
    model = tmp_path / "proc/device-tree/model"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\0")
    assert profile_here(tmp_path).name == "rpi-4b"


@pytest.mark.parametrize("required", [False, True])
def test_power_without_a_meter(required):
    command = ["power", "--meter", "model", "--profile", "rpi-4b", "--format", "json"]
    done = CliRunner().invoke(main, command + (["--require-measured"] if required else []))
    assert done.exit_code == (8 if required else 0)
    found = json.loads(done.stdout)
    assert found["reason"] == "no meter asked for (--meter model)"
    energy = found["energy"]
    assert energy["type"] == "modelled"
    assert "energy_j" not in energy
    assert energy["modelled_low_j"] < energy["modelled_j"] < energy["modelled_high_j"]
    assert energy["window_s"] == 10.0


def test_power_of_a_recorded_file(tmp_path):
    path = tmp_path / "meter.csv"
    path.write_text("t_s,power_w\n" + "".join(f"{n / 10},4\n" for n in range(111)))
    samples = tmp_path / "samples.csv"
    command = ["power", "--recorded", str(path), "--csv", str(samples), "--format", "json"]
    done = CliRunner().invoke(main, [*command, "--require-measured"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["energy"]["energy_j"] == pytest.approx(44.0)
    assert len(samples.read_text().splitlines()) == 112
    told = CliRunner().invoke(main, ["power", "--recorded", str(path)]).stdout
    for what in ("44.000 J +-", "4.000 W at board-dc", "111 readings", "largest gap 0.10 s"):
        assert what in told


@pytest.mark.parametrize(
    "command",
    [
        ["emulate"],
        ["device", "--id", "pi", "--broker", "127.0.0.1:9", "--data", "SHARD", "--meter", "model"],
    ],
    ids=["emulate", "device"],
)
def test_measured_energy_that_is_required_and_not_there(command, tmp_path):
    runner = CliRunner()
    assert (
        runner.invoke(main, ["shard", "digits", "--devices", "1", "--out", str(tmp_path)]).exit_code
        == 0
    )
    command = [str(tmp_path / "shard-000.npz") if word == "SHARD" else word for word in command]
    if command[0] == "device":
        command += ["--state", str(tmp_path / "state")]
    done = runner.invoke(main, [*command, "--require-measured"])
    assert done.exit_code == 8
    assert done.stderr.splitlines()[-1].startswith("musplit: error: energy is not measured here: ")


# -- a run with meters


class Feed:
    """A meter of 4 W on a port, 50 lines a second."""

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                peer, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(peer,), daemon=True).start()

    @staticmethod
    def _talk(peer):
        try:
            while True:
                peer.sendall(f"{time.monotonic():.4f} 4.0\n".encode())
                time.sleep(0.02)
        except OSError:
            peer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.close()


@pytest.fixture(scope="module")
def metered(tmp_path_factory):
    """Two devices with a meter each, three seconds at least; the server demands measurements."""
    folder = tmp_path_factory.mktemp("metered")
    config = {**TINY, "run.rounds": 12, "evaluation.control": False, "evaluation.target": 0.01}
    with Feed() as feed, Bench(folder) as bench:
        address = bench.broker()
        shards = make_shards(folder / "shards")
        server = bench.serve(address, folder / "run", config, "--require-measured")
        meter = ("--meter", f"lines:tcp://127.0.0.1:{feed.port}", "--require-measured")
        children = [
            bench.device(f"pi-{n}", address, shard, "--delay-s", "0.3", *meter)
            for n, shard in enumerate(shards)
        ]
        assert server.finish(240.0) == 0, server.stderr
        for child in children:
            assert child.finish(20.0) == 0, child.stderr
    return folder / "run", children[0].stderr


def test_a_metered_run_is_measured(metered):
    run, said = metered
    summary = json.loads((run / "summary.json").read_text())
    rows = json.loads((run / "energy.json").read_text())
    assert "energy: measured by tcp://127.0.0.1" in said
    window_s = sum(row["window_s"] for row in rows)
    assert summary["measured_energy_j"] == pytest.approx(4.0 * window_s, rel=0.01)
    assert summary["modelled_energy_j"] is None
    assert abs(summary["measured_energy_net_j"]) < 0.02 * summary["measured_energy_j"]
    assert 0 < summary["measured_energy_to_target_j"] <= summary["measured_energy_j"]
    assert summary["measured_energy_boundary"] == "board-dc"


def test_phases_of_a_metered_run_add_up_within_two_hundredths(metered):
    summary = json.loads((metered[0] / "summary.json").read_text())
    phases = summary["measured_energy_by_phase_j"]
    assert tuple(phases) == PHASES
    assert sum(phases.values()) == pytest.approx(summary["measured_energy_j"], rel=0.02)
    assert phases["wait"] > phases["encode"] > 0


def test_rows_of_a_metered_run_grow(metered):
    run = metered[0]
    joules = [row["measured_energy_j"] for row in read_jsonl(run / "rounds.jsonl")]
    known = [value for value in joules if value is not None]
    assert known == sorted(known)
    assert len(known) > 3
    header = (run / "devices.csv").read_text().splitlines()[0].split(",")
    assert {"energy_j", "forward_energy_j", "meter", "modelled_j", "reason"} <= set(header)
    assert read_jsonl(run / "devices.jsonl")[-1]["energy"]["type"] == "measured"
