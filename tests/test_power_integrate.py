"""From readings to joules, by phase too, and what the sampler does with its time."""

from __future__ import annotations

import numpy as np
import pytest
from power_support import Bench, constant, origin, square, step

from edge_client.errors import GapError, MeterError
from edge_client.power.account import Account
from edge_client.power.integrate import Trace, integrate
from edge_client.power.meter import Reading
from edge_client.power.model import board_model
from edge_client.power.phases import FORWARD, PERTURB, PHASES, RADIO, WAIT, Stopwatch
from edge_client.power.sampler import Sampler
from firmware_profiles.catalogue import load_profile
from wire_protocol.energy import MeasuredByPhase, NoEnergy


class Follows:
    """A meter that reads a load."""

    def __init__(self, load, bench, reading="instant"):
        self.load, self.bench, self.origin = load, bench, origin(reading)

    def read(self):
        now_s = self.bench.now_s()
        return Reading(now_s, self.load.power_w(now_s))

    def close(self):
        pass


def trace(times_s, powers_w, reading="instant", reason=""):
    return Trace(np.array(times_s, float), np.array(powers_w, float), origin(reading), reason)


def test_edges_are_interpolated():
    ramp = trace(np.arange(0, 13), np.arange(0, 13) * 2.0)
    measured = integrate(ramp, 0.5, 11.25)
    assert measured.energy_j == pytest.approx(11.25**2 - 0.5**2)
    assert measured.samples == 11
    assert measured.window_s == 10.75


def test_means_hold_back_to_the_reading_before():
    means = trace([1, 2, 3, 12], [5.0, 1.0, 3.0, 2.0], "mean")
    with pytest.raises(GapError, match=r"9\.00 s without a reading"):
        integrate(means, 1.5, 11.0)
    means = trace(np.arange(20), [1.0, 3.0] * 10, "mean")
    assert integrate(means, 0.5, 15.5).energy_j == pytest.approx(0.5 * 3 + 7 * 4 + 0.5 * 1)


def test_gross_and_net_of_idle():
    flat = trace(np.arange(0, 12.1, 0.1), np.full(121, 4.0))
    measured = integrate(flat, 1.0, 11.0, idle_w=2.5)
    assert measured.energy_j == pytest.approx(40.0)
    assert measured.net_j == pytest.approx(15.0)
    assert integrate(flat, 1.0, 11.0).net_j is None
    assert measured.uncertainty_j == pytest.approx(0.4)  # the meter's 1 %: nothing jumps


def test_jumps_between_readings_are_uncertain_and_the_error_stays_below():
    load = square(0.05, hz=3.3)  # too fast for ten readings a second
    bench = Bench(11.5, lambda _: None)
    measured = integrate(bench.sample(Follows(load, bench)), 0.5, 10.9)
    error_j = abs(measured.energy_j - load.energy_j(10.9) + load.energy_j(0.5))
    assert error_j < measured.uncertainty_j
    assert measured.uncertainty_j > 2 * 0.01 * measured.energy_j


@pytest.mark.parametrize("phase", np.linspace(0, 0.95, 20))
def test_a_square_wave_at_any_phase_and_with_late_readings(phase):
    load = square(phase)
    bench = Bench(11.5, lambda _: None)
    measured = integrate(bench.sample(Follows(load, bench)), 0.5, 10.9)
    assert measured.energy_j == pytest.approx(load.energy_j(10.9) - load.energy_j(0.5), rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_window_of_no_length_is_refused(seconds):
    with pytest.raises(GapError, match="is none"):
        integrate(trace(np.arange(5), np.ones(5)), 2.0, 2.0 + seconds)


def test_a_trace_without_readings_says_why():
    with pytest.raises(GapError, match=r"0 readings of test in 10.00 s \(the plug is off\)"):
        integrate(trace([], [], reason="the plug is off"), 0.0, 10.0)


def test_late_readings_are_not_made_up_for():
    """A reading that took long is followed by one at the next time due, not by a burst."""
    bench = Bench(10.0, lambda _: None, jitter_s=0.0)

    class Slow(Follows):
        def read(self):
            reading = super().read()
            if 5 < self.bench.t_s < 5.1:
                self.bench.t_s += 0.77
            return reading

    times_s = bench.sample(Slow(constant(), bench)).times_s
    steps_s = np.diff(times_s)
    assert steps_s.min() > 0.02
    assert sorted(steps_s)[-2] < 0.2


def test_a_meter_that_fails_is_asked_again():
    bench = Bench(5.0, lambda _: None)

    class Flaky(Follows):
        def read(self):
            if int(self.bench.t_s * 10) % 5 == 0:
                raise MeterError("busy")
            return super().read()

    sampled = bench.sample(Flaky(constant(3.0), bench))
    assert sampled.reason == "busy"
    assert integrate(sampled, 0.5, 4.8).energy_j == pytest.approx(3.0 * 4.3)


def test_the_thread_reads_beside_other_work():
    import time  # noqa: PLC0415

    class Clocked(Follows):
        def read(self):
            return Reading(time.monotonic(), 1.0)

    with Sampler(Clocked(None, None), 200.0) as sampler:
        time.sleep(0.2)
    assert len(sampler.stop().times_s) > 5


# -- by phase


def follow_phases(schedule, load, seconds, reading="instant"):
    """An account of a program that goes through (phase, seconds) in turns, at 1 ms steps."""
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    account = Account(origin(reading), watch, 1.5)
    account.begin(0.0)
    true_j = dict.fromkeys(PHASES, 0.0)
    plan = [phase for phase, length in schedule for _ in range(round(length * 1000))]
    last_s = 0.0
    for tick in range(round(seconds * 1000)):
        watch.enter(plan[tick % len(plan)])
        true_j[plan[tick % len(plan)]] += load.energy_j(now[0] + 1e-3) - load.energy_j(now[0])
        now[0] += 1e-3
        if tick % 100 == 99:
            mean_w = (load.energy_j(now[0]) - load.energy_j(last_s)) / (now[0] - last_s)
            last_s = now[0]
            watts = mean_w if reading == "mean" else load.power_w(now[0])
            account.take(Reading(now[0], watts))
    return account, true_j, now[0]


LONG = [(PERTURB, 0.4), (FORWARD, 1.1), (RADIO, 0.7), (WAIT, 1.3)]
SHORT = [(PERTURB, 0.003), (FORWARD, 0.011), (WAIT, 0.008)]


def joules(energy):
    return {phase: getattr(energy, f"{phase}_energy_j") for phase in PHASES}


@pytest.mark.parametrize("schedule", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("reading", ["instant", "mean"])
def test_phases_share_the_energy_and_add_up(schedule, reading):
    account, true_j, now_s = follow_phases(schedule, step(8.0), 21.0, reading)
    energy = account.so_far(now_s, "")
    assert isinstance(energy, MeasuredByPhase)
    assert sum(joules(energy).values()) == pytest.approx(energy.energy_j)
    assert energy.energy_j == pytest.approx(sum(true_j.values()), rel=0.01)
    for phase, true in true_j.items():
        assert joules(energy)[phase] == pytest.approx(true, rel=0.03)
    assert energy.window_s == pytest.approx(21.0)


def test_an_account_begins_anew_with_every_run():
    account, _, now_s = follow_phases(LONG, constant(3.0), 10.0)
    account.begin(now_s)
    assert isinstance(account.so_far(now_s + 0.01, ""), NoEnergy)
    account.take(Reading(now_s + 0.05, 3.0))
    energy = account.so_far(now_s + 0.05, "")
    assert isinstance(energy, NoEnergy) or energy.window_s < 0.1


def test_a_lost_meter_leaves_no_figure():
    account, _, now_s = follow_phases(LONG, constant(3.0), 10.0)
    assert isinstance(account.so_far(now_s + 0.5, "unplugged"), MeasuredByPhase)
    lost = account.so_far(now_s + 2.0, "unplugged")
    assert isinstance(lost, NoEnergy)
    assert "2.00 s without a reading of test in 12.00 s: unplugged" in lost.reason


# -- the model


def test_the_model_has_bounds_and_phases_that_add_up():
    profile = load_profile("rpi-4b")
    model = board_model(profile.name, profile.power, profile.cpu.cores, 4)
    seconds = dict.fromkeys(PHASES, 2.0)
    energy = model.by_phase(seconds)
    idle_w, load_w = profile.power.idle.value_w, profile.power.load.value_w
    assert energy.modelled_j == pytest.approx(8.0 * load_w + 4.0 * idle_w)
    assert energy.modelled_low_j == pytest.approx(0.6 * energy.modelled_j)
    assert energy.modelled_high_j == pytest.approx(1.4 * energy.modelled_j)
    phases = sum(getattr(energy, f"{phase}_modelled_j") for phase in PHASES)
    assert phases == pytest.approx(energy.modelled_j)
    one = board_model(profile.name, profile.power, profile.cpu.cores, 1)
    assert one.busy_w == pytest.approx(idle_w + (load_w - idle_w) / 4)
