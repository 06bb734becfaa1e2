"""Meters on the board against trees of known energy, and what goes wrong with sensors."""

from __future__ import annotations

import pytest
from power_support import LOADS, Bench, constant, drop_hwmon, put, put_hwmon, square

from edge_client.errors import GapError, MeterError
from edge_client.power.find import MeterOptions, find_meter, survey
from edge_client.power.hwmon import HwmonMeter
from edge_client.power.integrate import integrate
from edge_client.power.jetson import JetsonMeter
from edge_client.power.pmic import OFFSET_W, SLOPE, PmicMeter
from edge_client.power.rapl import RaplMeter
from firmware_profiles.catalogue import load_profile
from wire_protocol.energy import NoEnergy

BEGIN_S, END_S = 0.43, 10.9
I2C = "sys/bus/i2c/devices"


def ina(name, **files):
    def build(root, load, bench):
        def follow(t):
            watts = load.power_w(t)
            values = {file: round(value(watts)) for file, value in files.items()}
            put_hwmon(root, 3, name, "1-0040", **values)

        return follow, lambda: HwmonMeter(root, name, rate_hz=10.0, now_s=bench)

    return build


def jetson_hwmon(rails, chip="1-0040", number=2):
    def build(root, load, bench):
        folder = root / I2C / chip / "hwmon" / f"hwmon{number}"
        put(folder / "name", "ina3221")
        for channel, (label, _) in enumerate(rails, start=1):
            put(folder / f"in{channel}_label", label)
            put(folder / f"in{channel}_input", 5000)

        def follow(t):
            for channel, (_, share) in enumerate(rails, start=1):
                put(folder / f"curr{channel}_input", round(load.power_w(t) * share / 5 * 1e3))

        return follow, lambda: JetsonMeter(root, rate_hz=10.0, now_s=bench)

    return build


def jetson_iio(rails):
    def build(root, load, bench):
        folder = root / I2C / "6-0040/iio:device0"
        for channel, (label, _) in enumerate(rails):
            put(folder / f"rail_name_{channel}", label)

        def follow(t):
            for channel, (_, share) in enumerate(rails):
                put(folder / f"in_power{channel}_input", round(load.power_w(t) * share * 1e3))

        return follow, lambda: JetsonMeter(root, rate_hz=10.0, now_s=bench)

    return build


def rapl(range_uj):
    def build(root, load, bench):
        zones = root / "sys/class/powercap"

        labels = {
            "intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:1": "dram",
            "intel-rapl:0:0": "core",  # inside of package-0
            "intel-rapl-mmio:0": "package-0",  # the same once more
        }  # fmt: skip
        for name, label in labels.items():
            put(zones / name / "name", label)
            put(zones / name / "max_energy_range_uj", range_uj)
            put(zones / name / "energy_uj", 1)

        def follow(t):
            whole = load.energy_j(t)
            for name, joules in (
                ("intel-rapl:0", whole * 0.6 + 7),
                ("intel-rapl:1", whole * 0.3 + 3),
                ("intel-rapl:0:1", whole * 0.1),
            ):
                put(zones / name / "energy_uj", int(joules * 1e6) % range_uj)

        return follow, lambda: RaplMeter(root, rate_hz=10.0, now_s=bench)

    return build


def pmic(root, load, bench):
    """Two rails of twelve; the sum is what the fit makes the board's power of."""

    def follow(t):
        rails_w = (load.power_w(t) - OFFSET_W) / SLOPE
        put(
            root / "adc",
            f"     3V7_WL_SW_A current(0)={rails_w * 0.25 / 3.7:.8f}A\n"
            f"       VDD_CORE_A current(7)={rails_w * 0.75 / 0.72:.8f}A\n"
            "   3V7_WL_SW_V volt(8)=3.70000000V\n    VDD_CORE_V volt(15)=0.72000000V\n"
            "       EXT5V_V volt(24)=5.15000000V\n       BATT_V volt(25)=0.00000000V",
        )

    return follow, lambda: PmicMeter(rate_hz=10.0, command=["cat", root / "adc"], now_s=bench)


BOARDS = {
    "ina219": ina("ina219", power1_input=lambda w: w * 1e6),
    "ina226": ina("ina226", power1_input=lambda w: w * 1e6),
    "ina260": ina("ina260", power1_input=lambda w: w * 1e6),
    "volts and amperes": ina("ina219", in1_input=lambda _: 5100, curr1_input=lambda w: w / 5.1e-3),
    "Jetson 5, input": jetson_hwmon([("VDD_IN", 1.0), ("VDD_CPU_GPU_CV", 0.5), ("VDD_SOC", 0.3)]),
    "Jetson 5, rails": jetson_hwmon([("VDD_GPU_SOC", 0.7), ("VDD_CPU_CV", 0.3), ("NC", 9.0)]),
    "Jetson 4, input": jetson_iio([("POM_5V_IN", 1.0), ("POM_5V_GPU", 0.4), ("POM_5V_CPU", 0.3)]),
    "Jetson 4, rails": jetson_iio([("GPU", 0.5), ("NC", 3.0), ("CPU", 0.5)]),
    "rapl": rapl(1 << 40),
    "rapl that wraps": rapl(9_000_000),
    "pmic": pmic,
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_energy_is_known_within_a_hundredth(board, load, tmp_path):
    t_s = [0.0]
    follow, make = board(tmp_path, load, lambda: t_s[0])

    def turn(now_s):
        t_s[0] = now_s
        follow(now_s)

    bench = Bench(11.5, turn)
    trace = bench.sample(make())
    measured = integrate(trace, BEGIN_S, END_S)
    true_j = load.energy_j(END_S) - load.energy_j(BEGIN_S)
    assert measured.energy_j == pytest.approx(true_j, rel=0.01)
    assert 9.9 < measured.rate_hz < 10.2
    assert measured.largest_gap_s < 0.11


# -- which sensor


def test_two_of_a_name_have_to_be_told_apart(tmp_path):
    put_hwmon(tmp_path, 0, "ina226", "1-0040", power1_input=1_000_000)
    put_hwmon(tmp_path, 1, "ina226", "1-0041", power1_input=2_000_000)
    with pytest.raises(MeterError, match=r"name one: hwmon:ina226@1-0040, hwmon:ina226@1-0041"):
        HwmonMeter(tmp_path, "ina226", rate_hz=10.0)
    meter = find_meter(MeterOptions("ina226:1-0041"), root=tmp_path)
    assert meter.read().power_w == 2.0


def test_what_has_to_be_named_is_said_where_nothing_was_named(tmp_path):
    put_hwmon(tmp_path, 0, "ina226", "1-0040", power1_input=1_000_000)
    put_hwmon(tmp_path, 1, "ina226", "1-0041", power1_input=2_000_000)
    assert (
        "hwmon:ina226@1-0040, hwmon:ina226@1-0041"
        in find_meter(MeterOptions(), None, tmp_path).reason
    )


def test_several_channels_have_to_be_named_and_those_that_are_not_connected_are_none(tmp_path):
    files = {f"power{n}_input": n * 1_000_000 for n in (1, 2, 3)}
    labels = {"power1_label": "NC", "power2_label": "total", "power3_label": "12 V"}
    put_hwmon(tmp_path, 5, "corsairpsu", "3-1", **files, **labels)
    with pytest.raises(MeterError, match=r"several channels \(power2 total, power3 12 V\)"):
        find_meter(MeterOptions("hwmon:corsairpsu"), root=tmp_path)
    assert find_meter(MeterOptions("hwmon:corsairpsu/power2"), root=tmp_path).read().power_w == 2.0
    with pytest.raises(MeterError, match="no power1 that is connected"):
        find_meter(MeterOptions("hwmon:corsairpsu/power1"), root=tmp_path)


def test_a_single_channel_labelled_nc_is_no_meter(tmp_path):
    put_hwmon(tmp_path, 0, "ina226", "1-0040", power1_input=5, power1_label="NC")
    assert isinstance(find_meter(MeterOptions(), root=tmp_path), NoEnergy)


def test_a_chip_that_both_jetson_drivers_show_counts_once(tmp_path):
    for board in (
        jetson_hwmon([("VDD_GPU", 0.5), ("VDD_CPU", 0.5)]),
        jetson_iio([("VDD_GPU", 0.5), ("VDD_CPU", 0.5)]),
    ):
        board(tmp_path, constant(4.0), lambda: 0.0)[0](0.0)
    assert JetsonMeter(tmp_path, rate_hz=10.0).read().power_w == pytest.approx(4.0)


def test_rails_of_several_chips_add_up_and_sums_of_shunts_do_not(tmp_path):
    first = jetson_hwmon([("VDD_GPU_SOC", 0.4), ("VDD_CPU_CV", 0.3)])
    second = jetson_hwmon([("VIN_SYS_5V0", 0.3), ("NC", 5.0)], chip="1-0041", number=3)
    for board in (first, second):
        board(tmp_path, constant(10.0), lambda: 0.0)[0](0.0)
    extra = tmp_path / I2C / "1-0040/hwmon/hwmon2"
    put(extra / "in7_label", "sum of shunt voltages")
    put(extra / "in7_input", 90)
    put(extra / "curr4_input", 9000)
    meter = JetsonMeter(tmp_path, rate_hz=10.0)
    assert meter.read().power_w == pytest.approx(10.0)
    assert meter.origin.boundary == "soc-rails"
    assert meter.origin.driver == "ina3221: VDD_CPU_CV + VDD_GPU_SOC + VIN_SYS_5V0"


def test_the_profile_says_which_sensor_is_preferred(tmp_path):
    put_hwmon(tmp_path, 0, "ina226", "1-0040", power1_input=1_000_000)
    rapl(1 << 40)(tmp_path, constant(), lambda: 0.0)[0](0.0)
    assert find_meter(MeterOptions(), root=tmp_path).origin.meter == "ina226"
    laptop = load_profile("laptop")
    assert find_meter(MeterOptions(), laptop, tmp_path).origin.meter == "rapl"


def test_other_hwmon_sensors_are_listed_with_how_to_name_them(tmp_path):
    put_hwmon(tmp_path, 4, "amdgpu", "0000:03:00.0", power1_average=9_000_000)
    found = [f for f in survey(None, tmp_path) if f.usable]
    assert [f.detail for f in found] == ["amdgpu: --meter hwmon:amdgpu@0000:03:00.0/power1"]
    named = MeterOptions("hwmon:amdgpu@0000:03:00.0/power1")
    assert find_meter(named, root=tmp_path).read().power_w == 9.0


def test_no_sensor_is_a_reason_that_names_every_kind(tmp_path):
    found = find_meter(MeterOptions(), root=tmp_path)
    assert isinstance(found, NoEnergy)
    for kind in ("pmic", "ina226", "ina3221", "rapl"):
        assert kind in found.reason


def test_a_counter_that_only_root_may_read_says_so(tmp_path, monkeypatch):
    rapl(1 << 40)(tmp_path, constant(), lambda: 0.0)[0](0.0)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edge_client.power.sysfs.os.open", refuse)
    found = find_meter(MeterOptions(), root=tmp_path)
    assert "permission denied; run as root, or once: chmod a+r" in found.reason


def test_a_raspberry_pi_4_is_told_that_it_has_no_such_chip(tmp_path):
    put(tmp_path / "adc", 'error=1 error_msg="Command not registered"')
    with pytest.raises(MeterError, match="not a Raspberry Pi 5"):
        PmicMeter(rate_hz=10.0, command=["cat", tmp_path / "adc"])


# -- in mid-run


def run_with(tmp_path, happen, seconds=12.0, load=None):
    """A trace of an ina226, in which something happens at a time."""
    load = load or constant(4.0)

    def follow(t):
        folder = happen(t)
        if folder is not None:
            put_hwmon(tmp_path, folder, "ina226", "1-0040", power1_input=int(load.power_w(t) * 1e6))

    bench = Bench(seconds, follow)
    return bench.sample(HwmonMeter(tmp_path, "ina226", rate_hz=10.0, now_s=bench.now_s))


def test_a_sensor_that_is_renumbered_is_found_again(tmp_path):
    def happen(t):
        if t > 5 and not (tmp_path / "sys/class/hwmon/hwmon7").exists():
            drop_hwmon(tmp_path)
            # Its old number is another sensor's now.
            put_hwmon(tmp_path, 3, "ina219", "1-0044", power1_input=99_000_000)
        return 3 if t <= 5 else 7

    measured = integrate(run_with(tmp_path, happen), BEGIN_S, END_S)
    assert measured.energy_j == pytest.approx(4.0 * (END_S - BEGIN_S), rel=1e-6)
    assert measured.largest_gap_s < 0.11


def test_a_lost_sensor_ends_the_window_with_the_reason(tmp_path):
    def happen(t):
        if t > 5:
            drop_hwmon(tmp_path)
            return None
        return 3

    trace = run_with(tmp_path, happen)
    with pytest.raises(GapError, match=r"without a reading of ina226 .* no hwmon device"):
        integrate(trace, BEGIN_S, END_S)
    assert integrate(trace, 0.4, 4.9).energy_j == pytest.approx(4.0 * 4.5, rel=1e-6)


def test_another_sensor_of_the_name_does_not_stand_in_for_the_lost_one(tmp_path):
    def happen(t):
        if t > 5:
            drop_hwmon(tmp_path)
            put_hwmon(tmp_path, 3, "ina226", "1-0041", power1_input=9_000_000)
            return None
        return 3

    with pytest.raises(GapError, match="at 1-0040"):
        integrate(run_with(tmp_path, happen), BEGIN_S, END_S)


@pytest.mark.parametrize(("gap_s", "refused"), [(0.9, False), (2.0, True)])
def test_a_gap_of_more_than_a_tenth_of_the_window_is_refused(tmp_path, gap_s, refused):
    def happen(t):
        if 5 < t < 5 + gap_s:
            drop_hwmon(tmp_path)
            return None
        return 3

    trace = run_with(tmp_path, happen)
    if refused:
        with pytest.raises(GapError, match=r"2\.\d\d s without a reading .* more than 10%"):
            integrate(trace, BEGIN_S, END_S)
    else:
        measured = integrate(trace, BEGIN_S, END_S)
        assert measured.energy_j == pytest.approx(4.0 * (END_S - BEGIN_S), rel=1e-6)
        assert measured.largest_gap_s == pytest.approx(gap_s, abs=0.2)


def test_readings_of_0_watts_are_no_readings(tmp_path):
    load = constant(4.0)._replace(power_w=lambda t: 0.0 if 5 < t < 5.5 else 4.0)
    measured = integrate(run_with(tmp_path, lambda _: 3, load=load), BEGIN_S, END_S)
    assert measured.energy_j == pytest.approx(4.0 * (END_S - BEGIN_S), rel=1e-6)
    assert measured.largest_gap_s > 0.5
    dead = load._replace(power_w=lambda _: 0.0)
    with pytest.raises(GapError, match="ina226 reads 0 W: off, or wired wrongly"):
        integrate(run_with(tmp_path, lambda _: 3, load=dead), BEGIN_S, END_S)


def test_a_sensor_that_stays_away_is_given_up(tmp_path):
    def happen(t):
        if t > 5:
            drop_hwmon(tmp_path)
            return None
        return 3

    asked = []
    run_with(tmp_path, lambda t: (asked.append(t), happen(t))[1], seconds=1000.0)
    assert 34 < asked[-1] < 40


def test_the_counter_tells_what_a_gap_took(tmp_path):
    """RAPL's reading after a gap is the mean over it: nothing is interpolated."""
    load = square(0.2, hz=0.7)
    t_s = [0.0]
    follow, make = rapl(9_000_000)(tmp_path, load, lambda: t_s[0])
    gone = tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj"

    def turn(now_s):
        t_s[0] = now_s
        follow(now_s)
        if 5 < now_s < 5.8:
            gone.unlink()

    trace = Bench(11.5, turn).sample(make())
    true_j = load.energy_j(END_S) - load.energy_j(BEGIN_S)
    assert integrate(trace, BEGIN_S, END_S).energy_j == pytest.approx(true_j, rel=0.01)
