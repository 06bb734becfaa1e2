"""Fleets by profile: the file, the schedule that devices are held to, and a whole emulation.

A busy machine makes steps late, never early; what is compared below leaves it room by slow motion.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from importlib.resources import files

import msgspec
import numpy as np
import pytest
from core_support import tiny_config
from harness import Bench

from edge_client.bundle import read_bundle
from edge_client.errors import PaceError
from edge_client.pacing import PacedSession, Pacing
from edge_client.stand_in import Delay, StandIn, read_stand_in
from emulation.emulated import late_steps
from emulation.errors import FleetFileError
from emulation.fleet import load_fleet, save_fleet, saved_fleet
from emulation.slow_motion import settle
from firmware_profiles.schema import Calibrated
from server_node.prepare import prepare
from wire_protocol.messages import Welcome

RPI_4B = files("firmware_profiles").joinpath("boards/rpi-4b.toml").read_text(encoding="utf-8")
BATCH = 8


class SlowSession:
    """Forwards that take as long as they are told, in turn."""

    def __init__(self, *seconds):
        self.parameters = np.zeros(1, np.float32)
        self._seconds = itertools.cycle(seconds)

    def forward(self, xs):
        time.sleep(next(self._seconds))
        return xs


# -- the schedule ----------------------------------------------------------------------------


def spent_s(session, forwards):
    begin_s = time.monotonic()
    for _ in range(forwards):
        session.forward([])
    return time.monotonic() - begin_s


def test_forwards_are_held_to_a_schedule_whatever_they_take():
    steady = PacedSession(SlowSession(0.0), Pacing(forward_s=0.05))
    disturbed = PacedSession(SlowSession(0.08, 0.0, 0.0), Pacing(forward_s=0.05))
    for session in (steady, disturbed):
        session.start_round(0)
        assert spent_s(session, 6) == pytest.approx(0.3, rel=0.15)


def test_time_outside_the_schedule_is_no_head_start():
    session = PacedSession(SlowSession(0.0), Pacing(forward_s=0.05))
    session.start_round(0)
    session.forward([])
    session.leave()
    time.sleep(0.2)
    session.go_on()
    assert spent_s(session, 4) == pytest.approx(0.2, rel=0.15)


def test_a_round_that_came_late_takes_nothing_from_the_next():
    session = PacedSession(SlowSession(0.1), Pacing(forward_s=0.02))
    session.start_round(0)
    session.forward([])
    session.start_round(1)
    assert spent_s(session, 1) >= 0.1


def test_delays_are_drawn_round_by_round():
    waited = []
    session = PacedSession(SlowSession(0.0), Pacing(delay_s=lambda n: waited.append(n) or 0.0))
    session.start_round(3)
    session.start_round(4)
    assert waited == [3, 4]


@pytest.mark.parametrize("model", ["constant", "exponential", "uniform"])
def test_delay_distributions_have_their_mean_and_are_functions_of_their_coordinates(model):
    delay = Delay(2.0, model)
    drawn = [delay.draw_s(7, 3, number) for number in range(4000)]
    assert statistics.mean(drawn) == pytest.approx(2.0, rel=0.1)
    assert drawn == [delay.draw_s(7, 3, number) for number in range(4000)]
    if model != "constant":
        assert len(set(drawn)) == len(drawn)
        assert drawn[0] != delay.draw_s(7, 4, 0) != delay.draw_s(8, 4, 0)
    if model == "uniform":
        assert min(drawn) >= 1.0
        assert max(drawn) <= 3.0


# -- what a device stands for ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    experiment = prepare(tiny_config(), tmp_path_factory.mktemp("half") / "run")
    return read_bundle(experiment.exported.client)


def welcome(bundle):
    return Welcome(
        run=99, run_seed=7, epoch=5, device=2, manifest_sha256=bundle.digest, manifest_bytes=1,
        directions_sha256="0" * 64, lam=1e-3, batch=BATCH, directions=2, rounds=10, next_round=0,
        encoding="float32", compression="none", feedback="loss_difference", optimiser="sgd",
        momentum=0.9, beta2=0.999, asynchronous=False,
    )  # fmt: skip


def graph(bundle):
    return bundle.manifest.graph.sha256


def stand_in(folder, *, ratio=1.0, calibrated=()):
    return StandIn("a-board", ratio, 4, 1, str(folder), list(calibrated))


def test_ratios_are_exact_however_busy_the_machine_is(bundle, tmp_path):
    """All devices of a machine use what the first one measured."""
    boards = [stand_in(tmp_path, ratio=ratio) for ratio in (1.0, 2.5, 7.0)]
    paces = [board.pacing(welcome(bundle), bundle).forward_s for board in boards]
    assert [pace / paces[0] for pace in paces] == pytest.approx([1.0, 2.5, 7.0])
    asked = [board.known_s(graph(bundle), BATCH, 2) for board in boards]
    assert asked == pytest.approx(paces)


def test_a_calibrated_step_stands_instead_of_the_factor(bundle, tmp_path):
    entry = Calibrated(graph(bundle), "fc1", BATCH, 4, directions=2, step_s=5.0, source="evidence")
    board = stand_in(tmp_path, ratio=3.0, calibrated=[entry])
    assert board.pacing(welcome(bundle), bundle).forward_s == pytest.approx(1.0)
    for change in ({"batch": 9}, {"threads": 3}, {"graph": "f" * 64}):
        other = msgspec.structs.replace(entry, **change)
        board = stand_in(tmp_path, ratio=3.0, calibrated=[other])
        assert board.pacing(welcome(bundle), bundle).forward_s < 0.5


def test_a_board_that_is_faster_than_this_machine_is_refused(bundle, tmp_path):
    entry = Calibrated(graph(bundle), "fc1", BATCH, 4, directions=2, step_s=1e-9, source="evidence")
    board = stand_in(tmp_path, calibrated=[entry])
    for other in (board, stand_in(tmp_path, ratio=0.5)):
        with pytest.raises(PaceError, match=r"a-board takes .* ms .* this machine .* too slow"):
            other.pacing(welcome(bundle), bundle)


def test_the_file_of_a_stand_in(tmp_path):
    path = tmp_path / "device.json"
    path.write_bytes(msgspec.json.encode(stand_in(tmp_path, ratio=2.0)))
    assert read_stand_in(path) == stand_in(tmp_path, ratio=2.0)
    for text in ("{", '{"board": "x", "ratio": 0}', '{"bored": 1}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PaceError, match=r"device\.json: .*musplit emulate --fleet"):
            read_stand_in(path)
    with pytest.raises(PaceError, match="cannot be read"):
        read_stand_in(tmp_path / "none")


# -- the fleet file --------------------------------------------------------------------------


def fleet(folder, text):
    path = folder / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_counts_links_and_delays(tmp_path):
    (tmp_path / "mine.toml").write_text(
        RPI_4B.replace('name = "rpi-4b"', 'name = "mine"'), encoding="utf-8"
    )
    devices, slow_motion = load_fleet(
        fleet(
            tmp_path,
            "[[device]]\nprofile = 'rpi-zero-2w'\ncount = 2\nup_bits_s = 1e6\nloss = 0.01\n"
            "delay_s = 0.5\ndelay = 'exponential'\n[[device]]\nprofile = 'mine.toml'\n",
        )
    )
    assert slow_motion is None
    assert [device.profile.name for device in devices] == ["rpi-zero-2w", "rpi-zero-2w", "mine"]
    zero, mine = devices[0], devices[2]
    assert zero.link.up_bits_s == 1e6
    assert zero.link.down_bits_s == zero.profile.link.down_bits_s.value
    assert (zero.link.loss, zero.delay) == (0.01, Delay(0.5, "exponential"))
    assert zero.ratio / mine.ratio == pytest.approx(2.16)
    save_fleet(devices, tmp_path)
    assert saved_fleet(tmp_path) == devices


def settled(text, bundle, folder):
    """What becomes of a fleet file on this machine."""
    config = tiny_config(f"devices.batch={BATCH}")
    return settle(load_fleet(fleet(folder, text)), bundle, config, folder / "turns")


def test_slow_motion_slows_everything_and_changes_nothing_of_the_board(bundle, tmp_path):
    entry = "[[device]]\nprofile = 'rpi-4b'\nup_bits_s = 1e6\nlatency_s = 0.1\ndelay_s = 1.0\n"
    (fast,) = load_fleet(fleet(tmp_path, entry)).devices
    (slow,) = settled(f"slow_motion = 400\n{entry}", bundle, tmp_path).devices
    assert (slow.link_here.up_bits_s, slow.link_here.latency_s) == (2500.0, pytest.approx(40.0))
    assert (slow.link, slow.delay, slow.ratio) == (fast.link, fast.delay, fast.ratio)
    paces = [
        device.stand_in(tmp_path / "turns").pacing(welcome(bundle), bundle)
        for device in (fast, slow)
    ]
    assert paces[1].forward_s == pytest.approx(400 * paces[0].forward_s)
    assert [pace.delay_s(0) for pace in paces] == [1.0, 400.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"device.*missing|missing required field `device`"),
        ("[[device]]\nprofile = 'rpi-6'\n", r"device\[0\]\.profile: .*'rpi-6': unknown"),
        ("[[device]]\nprofile = 'none.toml'\n", r"none\.toml: cannot be read"),
        ("[[device]]\nprofile = 'rpi-4b'\ncount = 0\n", r"device\[0\]\.count|device\[\.\.\.\]"),
        ("[[device]]\nprofile = 'rpi-4b'\nspeed = 2\n", r"unknown field `speed`"),
        ("host = 'rpi-6'\n[[device]]\nprofile = 'rpi-4b'\n", r"host: .*unknown"),
        ("[[device]", r"not TOML"),
        (f"a = {'9' * 5000}", r"not TOML: Exceeds"),
        (
            "slow_motion = 1\n[[device]]\nprofile = 'jetson-agx-orin'\n",
            r"jetson-agx-orin is 2 times as fast as this machine .*slow_motion = 1; .*\"auto\"",
        ),
        ("slow_motion = 0.5\n[[device]]\nprofile = 'rpi-4b'\n", r"slow_motion: .*>= 1"),
        (
            "slow_motion = 'fast'\n[[device]]\nprofile = 'rpi-4b'\n",
            r"slow_motion: .*Invalid enum value 'fast'",
        ),
    ],
)
def test_what_is_wrong_with_a_fleet_file(tmp_path, text, message):
    with pytest.raises(FleetFileError, match=message) as caught:
        load_fleet(fleet(tmp_path, text))
    assert str(caught.value).startswith(str(tmp_path / "fleet.toml"))
    assert "\n" not in str(caught.value)


def test_as_slow_as_this_machine_needs(bundle, tmp_path):
    """A crowd, or a board that is faster than this machine: slower, and the user is told."""
    many = settled("[[device]]\nprofile = 'rpi-5'\ncount = 1000\n", bundle, tmp_path)
    few = settled("[[device]]\nprofile = 'rpi-5'\ncount = 4\n", bundle, tmp_path)
    assert many.devices[0].slow_motion > 50 * few.devices[0].slow_motion > 50
    assert many.note.startswith("slow motion: rpi-5 takes ")
    assert f"everything takes {many.devices[0].slow_motion:g} times as long" in many.note
    assert many.warning == ""
    fast = settled("[[device]]\nprofile = 'jetson-agx-orin'\n", bundle, tmp_path)
    assert fast.devices[0].slow_motion > 1 / fast.devices[0].ratio
    assert fast.warning.startswith("a board is faster than this machine: jetson-agx-orin takes ")


def test_a_slow_motion_that_is_too_fast_is_warned_about(bundle, tmp_path):
    boards = "[[device]]\nprofile = 'rpi-5'\ncount = 100\n"
    found = settled(f"slow_motion = 2\n{boards}", bundle, tmp_path)
    assert found.devices[0].slow_motion == 2.0
    needed = re.search(r"100 devices on .* need slow_motion = (\S+) to keep", found.warning)
    assert needed is not None
    enough = settled(f"slow_motion = {needed[1]}\n{boards}", bundle, tmp_path)
    assert (enough.note, enough.warning) == ("", "")


def test_late_steps_are_warned_about():
    rows = [
        {"device": 0, "step_s_asked": 1.0, "step_s_median": 1.05},
        {"device": 1, "step_s_asked": 1.0, "step_s_median": 1.5},
        {"device": 2, "step_s_asked": None, "step_s_median": None},
    ]
    assert late_steps(rows).startswith("steps of devices 1 took longer")
    assert late_steps(rows[:1]) == ""


# -- a whole emulation -----------------------------------------------------------------------


def test_eight_boards_keep_their_ratios(tmp_path):
    """Medians of steps within 10 % of the factors' ratios, on the boards' links, in slow motion."""
    names = (
        "rpi-4b", "rpi-zero-2w", "rpi-3b-plus", "rpi-cm4", "jetson-nano", "rpi-4b:2048",
        "rpi-zero-2w", "rpi-3b-plus",
    )  # fmt: skip
    entries = "".join(f"[[device]]\nprofile = '{name}'\n" for name in names)
    path = fleet(tmp_path, f"slow_motion = 60\n{entries}")  # other tests compute meanwhile
    factors = [device.profile.speed.factor.value for device in load_fleet(path).devices]
    with Bench(tmp_path) as bench:
        child = bench.start(
            "emulate", "--fleet", str(path), "--out", "run", "--format", "json",
            "--set", "model.name=mlp:64-256-256-10", "--set", "model.cut=fc2",
            "--set", "devices.batch=64", "--set", "method.directions_client=2",
            "--set", "method.tau=1", "--set", "evaluation.control=false", "--rounds", "3",
            "--set", "method.eta_s=1e-4", "--set", "method.eta_c=1e-4",
        )  # fmt: skip
        assert child.finish(280.0) == 0, child.stderr
    rows = msgspec.json.decode((tmp_path / "run" / "summary.json").read_bytes())["emulated"]
    asked = [row["step_s_asked"] / rows[0]["step_s_asked"] for row in rows]
    assert asked == pytest.approx(factors)
    steps = [row["step_s_median"] / rows[0]["step_s_median"] for row in rows]
    assert steps == pytest.approx(factors, rel=0.1)
    for row in rows:
        assert row["step_s_median"] == pytest.approx(row["step_s_asked"], rel=0.1)
        assert 0 < row["modelled_low_j"] < row["modelled_j"] < row["modelled_high_j"]
        assert "energy_j" not in row
