"""Delay models and the virtual clock: pure, seeded, with the means that were asked for."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import msgspec
import numpy as np
import pytest

from emulation.clock import EventQueue
from emulation.delays import Delays, DeviceTiming, Draw, Presence, Timings, uniform
from emulation.errors import FitError
from emulation.fit import fit_timings
from emulation.traffic import publish_bytes
from server_node.config import load_config
from server_node.errors import ConfigError
from server_node.sections import SimulationSection
from wire_protocol.energy import NoEnergy
from wire_protocol.messages import Report


def delays(section: SimulationSection, seed: int = 0) -> Delays:
    return Delays(section, seed, directions=4, forward_flop=1e6)


def test_a_delay_is_a_function_of_seed_device_and_round() -> None:
    section = SimulationSection(compute="exponential")
    first = [delays(section).compute_s(device, n) for device in range(5) for n in range(20)]
    again = [delays(section).compute_s(device, n) for device in range(5) for n in range(20)]
    assert first == again
    assert len(set(first)) == 100
    assert delays(section, seed=1).compute_s(0, 0) != first[0]
    assert uniform(0, Draw.COMPUTE, 1, 2) != uniform(0, Draw.PRESENCE, 1, 2)


def test_means_and_spread_are_those_asked_for_and_cycled() -> None:
    section = SimulationSection(compute="exponential", mean_s=[1.0, 10.0])
    for device, mean_s in ((0, 1.0), (1, 10.0), (3, 10.0)):
        drawn = [delays(section).compute_s(device, n) for n in range(4000)]
        assert statistics.mean(drawn) == pytest.approx(mean_s, rel=0.06)
        assert statistics.stdev(drawn) == pytest.approx(mean_s, rel=0.1)
    flat = delays(SimulationSection(compute="uniform", mean_s=[2.0], spread=0.25))
    drawn = [flat.compute_s(0, n) for n in range(2000)]
    assert 1.5 <= min(drawn) < 1.52
    assert 2.48 < max(drawn) <= 2.5


def test_part_of_a_step_takes_its_share() -> None:
    model = delays(SimulationSection(compute="exponential"))
    assert model.for_forwards(2, 7, 3) == pytest.approx(model.compute_s(2, 7) / 3)


def test_gas_draws_power_and_place_once() -> None:
    model = delays(SimulationSection(compute="gas"))
    steps = [model.compute_s(device, 0) for device in range(200)]
    assert min(steps) >= 9e6 / 1e10
    assert max(steps) <= 9e6 / 1e9
    assert model.compute_s(3, 0) == model.compute_s(3, 99)
    rates = np.array([1e6 / model.up_s(device, 1_000_000) for device in range(200)])
    assert len(set(rates)) == 200
    assert rates.min() > 1e6  # 8 Mbit/s and more on 10 MHz within 500 m
    assert rates.max() < 1e8


def test_gas_knows_links_that_hardly_or_never_carry_anything() -> None:
    far = delays(SimulationSection(compute="gas", radius_km=1e6))
    assert 0 < far.up_s(0, 1) < math.inf
    deaf = delays(SimulationSection(compute="gas", radius_km=1e9, power_w=1e-300))
    with pytest.raises(ConfigError, match=r"radius_km.*use a smaller radius"):
        deaf.up_s(0, 1)


def test_links() -> None:
    model = delays(SimulationSection(up_bytes_s=[100.0, 200.0], latency_s=0.5))
    assert [model.up_s(device, 100) for device in range(3)] == [1.5, 1.0, 1.5]
    assert model.down_s(0, 100) == 0.5
    assert publish_bytes("a/b", 10) == 1 + 1 + 2 + 3 + 2 + 1 + 10
    assert publish_bytes("a/b", 1000) == 1 + 2 + 2 + 3 + 2 + 1 + 1000


def test_recorded_times() -> None:
    timings = Timings([DeviceTiming(0.5, 0.01), DeviceTiming(1.0, 0.02)], 0.1, 0.2)
    model = Delays(SimulationSection(compute="recorded"), 0, directions=4, timings=timings)
    assert model.compute_s(3, 0) == pytest.approx(1.0 + 9 * 0.02)
    assert model.for_forwards(3, 0, 9, begun=True) == pytest.approx(9 * 0.02)
    assert (model.server_step_s, model.server_measure_s) == (0.1, 0.2)


def test_a_fit_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        fit_timings(tmp_path / "nothing")
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(FitError, match="holds no times"):
        fit_timings(tmp_path)


def recorded(folder: Path, config: str = "", **changes: object) -> Path:
    """A run folder: two rounds of a device, 0.7 s to its activation, 33 forwards of 10 ms each."""
    place = {"device": 0, "round": 1}
    events = {
        "round": {"name": "round 1", "ts": 1e6},
        "arrived": {"name": "activation arrived", "ts": 1.7e6, "args": place},
        "step": {"name": "step", "dur": 2e4},
        "measure": {"name": "measure", "dur": 1.6e5, "args": place},
    }
    events |= {name: {**events[name], **change} for name, change in changes.items()}  # type: ignore[dict-item]
    report = Report(
        run=1, epoch=0, round=1, started_unix_s=1.0, perturb_s=0.03, forward_s=0.3, encode_s=0.0,
        wait_s=0.0, replay_s=0.0, bytes_up=0, bytes_down=0, bundle_bytes_up=0,
        bundle_bytes_down=0, rss_bytes=0, peak_rss_bytes=0, energy=NoEnergy("none"),
    )  # fmt: skip
    row = {**msgspec.to_builtins(report), "device_id": "pi", "device": 0}
    del row["type"]
    (folder / "config.toml").write_text(config)
    (folder / "trace.json").write_text("[\n" + ",\n".join(map(json.dumps, events.values())))
    (folder / "devices.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_fit_takes_links_and_forwards_apart(tmp_path: Path) -> None:
    timings = fit_timings(recorded(tmp_path))
    assert timings.devices == [pytest.approx((0.69, 0.01))]
    assert (timings.server_step_s, timings.server_measure_s) == pytest.approx((0.02, 0.01))
    frozen = fit_timings(recorded(tmp_path, '[model]\nperturb = ["none"]\n', measure={"name": "-"}))
    assert frozen.devices == [pytest.approx((0.37, 0.33))]  # one forward, not 33


def test_a_fit_takes_slow_motion_out_of_what_boards_took(tmp_path: Path) -> None:
    run = recorded(tmp_path, '[emulation]\nfleet = "boards.toml"\n')
    with pytest.raises(FitError, match="give a run that has ended"):
        fit_timings(run)
    (run / "summary.json").write_text('{"emulated": [{"device": 0, "slow_motion": 4.0}]}')
    timings = fit_timings(run)
    assert timings.devices == [pytest.approx((0.69 / 4, 0.01 / 4))]
    assert timings.server_step_s == pytest.approx(0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"round": {"ts": "early"}}, {"step": {"dur": -1.0}}, {"step": {"dur": math.nan}},
        {"step": {"dur": None}}, {"arrived": {"args": {"device": 0.5, "round": 1}}},
        {"arrived": {"args": {"device": -1, "round": 1}}}, {"measure": {"args": None}},
    ],
)  # fmt: skip
def test_a_damaged_trace_is_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(FitError, match=r"trace\.json: not a trace of this program"):
        fit_timings(recorded(tmp_path, **change))


def test_events_of_others_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="holds no times"):
        fit_timings(recorded(tmp_path, step={"name": 5}))


def test_spells_have_their_means() -> None:
    presence = Presence(SimulationSection(up_s=20.0, down_s=5.0), 0)
    spells = [presence.spell_s(0, spell) for spell in range(4000)]
    assert statistics.mean(spells[::2]) == pytest.approx(20.0, rel=0.1)
    assert statistics.mean(spells[1::2]) == pytest.approx(5.0, rel=0.1)
    assert not Presence(SimulationSection(), 0).changes


def test_events_happen_in_order_of_time_then_of_mention() -> None:
    queue, seen = EventQueue(), []
    for name, at_s in (("late", 3.0), ("a", 1.0), ("b", 1.0)):
        queue.at(at_s, lambda name=name: seen.append((name, queue.read_s())))
    queue.at(1.0, lambda: queue.at(1.5, lambda: seen.append(("child", queue.read_s()))))
    queue.wait_until(queue.next_s)
    queue.happen()
    assert seen == [("a", 1.0), ("b", 1.0)]
    queue.spend(1.0)
    queue.happen()
    assert seen[2:] == [("child", 2.0)]
    assert queue.next_s == 3.0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("simulation.compute=recorded", "names no run folder"),
        ("simulation.flops=[2e9, 1e9]", "must not exceed"),
        ("simulation.mean_s=[]", "mean_s"),
    ],
)
def test_what_makes_no_sense_is_refused(given: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(None, [given])
