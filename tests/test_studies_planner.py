"""The planner: fleet files, limits, seconds a round, what is measured, and the advice."""

import itertools
import json

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from core_support import tiny_config
from safetensors.torch import save_file

from emulation.simulate import simulate_curve
from export.models import build_model
from musplit.cli import main
from server_node.config import load_config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError
from studies.planner.choice import Choice, Probe
from studies.planner.cuts import model_cuts
from studies.planner.errors import FleetFileError, NoPlanError, TableError
from studies.planner.fleet import DeviceKind, Fleet, Search, Server, load_fleet
from studies.planner.learning import LearningTable, Observed
from studies.planner.options import Options
from studies.planner.plan import base_config, plan, planned_config
from studies.planner.reasons import excluded_lines
from studies.planner.search import search
from studies.planner.timing import draw_rounds, round_seconds

FLEET = """
[[device]]
name = "pi"
count = 2
memory_bytes = 500_000_000
flops_per_s = 1e6
up_bytes_s = 1e5
down_bytes_s = 1e6

[server]
step_s = 0.01

[search]
tau = [1, 4]
directions_client = [2]
"""
# Its second activation is four times as small as its first.
NARROWING = "mlp:64-64-16-10"


@pytest.fixture
def fleet_file(tmp_path):
    def write(text=FLEET):
        path = tmp_path / "fleet.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def kind(**changes):
    device = DeviceKind("pi", 500_000_000, 1e5, 1e6, count=2, flops_per_s=1e6)
    return msgspec.structs.replace(device, **changes)


def options(fleet, model="mlp:64-12-10", *overrides):
    base = base_config(model, fleet, None, ["devices.batch=8", *overrides])
    return Options(fleet, base, model_cuts(base, load_dataset(base.data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("count = 2", "cuont = 2"), "device.*cuont"),
        (("flops_per_s = 1e6", ""), "device pi: needs flops_per_s or forward_s"),
        (("step_s = 0.01", ""), "server: needs step_s or flops_per_s"),
        (("up_bytes_s = 1e5", "up_bytes_s = 0"), r"device.*up_bytes_s"),
        (("tau = [1, 4]", "tau = []"), r"search\.tau"),
        (("[server]", "[servant]"), "servant|server"),
        (("[server]", "[server"), "not TOML"),
        (("[search]", "[search]\nholdout = 0.0"), r"search\.holdout"),
    ],
)
def test_a_wrong_fleet_is_refused_with_its_field(fleet_file, change, message):
    with pytest.raises(FleetFileError, match=message) as caught:
        load_fleet(fleet_file(FLEET.replace(*change)))
    assert "\n" not in str(caught.value)


def test_devices_of_one_name_are_refused(fleet_file):
    device = FLEET.partition("[server]")[0]
    with pytest.raises(FleetFileError, match="'pi' stands there twice"):
        load_fleet(fleet_file(device + FLEET))


def test_a_missing_fleet_is_one_line(tmp_path):
    with pytest.raises(FleetFileError, match="cannot be read"):
        load_fleet(tmp_path / "none.toml")


def test_only_what_was_said_may_be_planned():
    fleet = Fleet([kind()], Server(step_s=0.01))
    with pytest.raises(ConfigError, match=r"round\.mode"):
        base_config("mlp:64-12-10", fleet, None, ["round.mode=asynchronous"])
    with pytest.raises(ConfigError, match=r"method\.server_batch: plans are for"):
        base_config("mlp:64-12-10", fleet, None, ["method.server_batch=pooled"])
    with pytest.raises(ConfigError, match=r"devices\.count: FLEET and MODEL say that"):
        base_config("mlp:64-12-10", fleet, None, ["devices.count=7"])
    with pytest.raises(ConfigError, match="'nosuch' is no cut"):
        options(msgspec.structs.replace(fleet, search=Search(cuts=["nosuch"])))


def test_every_exclusion_names_its_limit():
    small = kind(name="pi-zero", memory_bytes=88_000_000)
    wide = Search(directions_client=[2, 4096], encoding=["float32"])
    made = options(Fleet([kind(), small], Server(step_s=0.01), search=wide))
    assert {probe.directions_client for probe in made.choices} == {2}
    (line,) = excluded_lines(made)
    assert line == "cut fc1 in float32 with K 4096: 89 MB on pi-zero, 88 MB available"


def test_memory_of_devices_or_server_may_forbid_everything():
    tight = Fleet([kind(memory_bytes=1000)], Server(step_s=0.01))
    base = base_config("mlp:64-12-10", tight, None, [])
    with pytest.raises(NoPlanError, match=r"every choice: cut fc1 .* MB on pi, 0 MB available"):
        plan(base, tight, 0.5, 1, None)
    tight = Fleet([kind()], Server(step_s=0.01, memory_bytes=1000))
    with pytest.raises(NoPlanError, match="MB on the server"):
        plan(base, tight, 0.5, 1, None)


def test_a_cut_without_a_measured_forward_is_excluded():
    timed = kind(flops_per_s=0.0, forward_s={"fc1": 0.5})
    made = options(Fleet([timed], Server(step_s=0.01)), "mlp:64-12-12-10")
    assert {probe.cut for probe in made.choices} == {"fc1"}
    assert any("cut fc2" in line and "no forward_s" in line for line in excluded_lines(made))


def test_slow_links_want_small_activations_few_directions_and_int8():
    def fastest(up_bytes_s, **device):
        wide = Search(tau=[4], directions_client=[2, 8])
        fleet = Fleet([kind(up_bytes_s=up_bytes_s, **device)], Server(step_s=1e-4), search=wide)
        made = options(fleet, NARROWING)

        # As though every setting needed rounds in proportion to K ** -0.75.
        def time_s(probe):
            return made.round_s[probe] * probe.directions_client**-0.75

        best = min(made.choices, key=time_s)
        return best, made.choices[best].encoding

    slow, slow_encoding = fastest(1e3)
    assert (slow.cut, slow_encoding) == ("fc2", "int8")
    fast, fast_encoding = fastest(1e9, flops_per_s=1e4)
    assert (fast.cut, fast_encoding) == ("fc1", "float32")
    latent = Fleet([kind()], Server(step_s=1e-4))
    few = options(latent, NARROWING)
    by_k = [few.round_s[Probe("fc1", 1, k, 1, (), 0)] for k in (1, 8, 32)]
    assert by_k == sorted(by_k)


@pytest.mark.parametrize(
    ("mode", "delays"),
    [("serial", "exponential"), ("parallel", "constant")],
)
def test_a_round_takes_what_the_virtual_clock_takes(mode, delays):
    fleet = Fleet(
        [kind(up_bytes_s=2e4), kind(name="slow", count=1, flops_per_s=2e5)],
        Server(mode=mode, step_s=0.05, measure_s=0.01),
        search=Search(tau=[3], directions_client=[2], encoding=["float32"]),
    )
    fleet = msgspec.structs.replace(
        fleet, delays=msgspec.structs.replace(fleet.delays, model=delays, latency_s=0.03)
    )
    made = options(fleet, "mlp:64-12-10", "run.rounds=6", "evaluation.every=6")
    probe = Probe("fc1", 3, 2, 1, (), 1)
    choice = made.choices[probe]
    seconds = round_seconds(
        fleet, made.base, made.cuts["fc1"], choice, draw_rounds(fleet, made.base, 0, 6),
        made.sent(choice),
    )  # fmt: skip
    _, rows = simulate_curve(planned_config(made, choice))
    assert [row.simulated_s for row in rows] == pytest.approx(np.cumsum(seconds), rel=0.02)


class Bowl:
    """Answers in the place of runs: rounds fall with tau K, and large steps diverge."""

    def __init__(self):
        self.asked = []

    def __call__(self, probe, limit):
        self.asked.append((probe, limit))
        if probe.level == 2 and probe.tau > 4:
            return Observed(None, diverged=True)
        rounds = round(400 * (probe.tau * probe.directions_client) ** -0.5 / (1 + probe.level))
        return Observed(rounds if rounds <= limit else None, diverged=False)


def grid(second_cost):
    probes = itertools.product(["a", "b"], [1, 4, 16, 64], [1, 4, 16], [1], [()], [0, 1, 2])
    return {p: second_cost(p) for p in map(Probe._make, probes)}


def test_few_measurements_find_nearly_the_best():
    round_s = grid(lambda p: (1 if p.cut == "a" else 2) * (1 + 0.3 * p.directions_client))
    bowl = Bowl()
    found = search(round_s, bowl, 14, 200, 4)
    truth = {p: Bowl()(p, 10**6).rounds for p in round_s}
    best_s = min(rounds * round_s[p] for p, rounds in truth.items() if rounds is not None)
    mine_s = min(one.rounds * round_s[one.probe] for one in found if one.rounds is not None)
    assert len(found) <= 14
    assert mine_s <= 1.15 * best_s
    again = Bowl()
    assert search(round_s, again, 14, 200, 4) == found
    assert again.asked == bowl.asked


def test_nothing_runs_longer_than_the_best_time_or_beyond_divergence():
    round_s = grid(lambda p: 1.0 * p.directions_client)
    found = search(round_s, Bowl(), 30, 200, 4)
    best_s = float("inf")
    for one in found:
        assert one.limit <= max(4, 1 + best_s / round_s[one.probe])
        if one.rounds is not None:
            best_s = min(best_s, one.rounds * round_s[one.probe])
    assert len({one.probe for one in found}) == len(found)


def test_a_plan_is_made_checked_kept_and_repeated_without_a_run(fleet_file, tmp_path):
    arguments = [
        "plan", "mlp:64-12-10", "--fleet", str(fleet_file()), "--target", "0.2", "--budget", "2",
        "--table", str(tmp_path / "rounds.json"), "--out", str(tmp_path / "out"), "--set",
        "run.rounds=16", "--set", "devices.batch=8", "--format", "json",
    ]  # fmt: skip
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    facts = json.loads(first.stdout)
    assert facts["runs_made"] == 2
    advice = facts["advice"]
    assert advice["cut"] == "fc1"
    assert advice["total_s"] == pytest.approx(advice["rounds"] * advice["round_s"])
    config = load_config(tmp_path / "out" / "plan.toml", [])
    assert config.method.tau == advice["tau"]
    assert config.simulation.up_bytes_s == [1e5, 1e5]
    again = CliRunner().invoke(main, arguments[:-2]).stdout
    assert f"advice: cut fc1, tau {advice['tau']}, K 2, {advice['encoding']}" in again
    assert f"predicted {advice['rounds']} rounds, " in again
    assert "measured settings: 2, 0 of them now, 2 from the table" in again


def test_a_run_that_was_cut_short_is_repeated_only_for_more_rounds(tmp_path):
    config = tiny_config("run.rounds=6")
    data = load_dataset(config.data)
    table = LearningTable(tmp_path / "t.json", data, b"")
    assert table.observe(config, 1.0, 2) == Observed(None, diverged=False)
    assert table.observe(config, 1.0, 2) == Observed(None, diverged=False)
    assert table.made == 1
    other = LearningTable(tmp_path / "t.json", data, b"")
    other.observe(config, 1.0, 6)
    other.observe(config, 1.0, 100)
    assert other.made == 1
    LearningTable(tmp_path / "t.json", data, b"another model").observe(config, 1.0, 2)
    assert len(json.loads((tmp_path / "t.json").read_text())["runs"]) == 2


def test_a_target_that_the_initial_weights_reach_is_reached():
    config = tiny_config("run.rounds=6", "evaluation.every=2")
    table = LearningTable(None, load_dataset(config.data), b"")
    assert table.observe(config, 0.01, 6) == Observed(2, diverged=False)


def test_other_start_weights_are_another_run(tmp_path):
    config = tiny_config("run.rounds=2")
    weights = build_model(config.model.name, 0).module.state_dict()
    path = tmp_path / "start.safetensors"
    table = LearningTable(None, load_dataset(config.data), b"")
    for factor in (1.0, 0.5):
        save_file({name: factor * tensor for name, tensor in weights.items()}, path)
        for _ in range(2):
            table.observe(tiny_config("run.rounds=2", f"model.weights={path}"), 1.0, 2)
    assert table.made == 2


def test_a_plan_that_cannot_be_written_measures_nothing(fleet_file, tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, [
        "plan", "mlp:64-12-10", "--fleet", str(fleet_file()), "--target", "0.2", "--table",
        str(tmp_path / "rounds.json"), "--out", str(tmp_path / "file" / "out"),
    ])  # fmt: skip
    assert done.exit_code != 0
    assert "file/out" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "rounds.json").exists()


def test_a_damaged_table_is_one_line(tmp_path):
    (tmp_path / "t.json").write_text("{", encoding="utf-8")
    with pytest.raises(TableError, match="remove it"):
        LearningTable(tmp_path / "t.json", load_dataset(tiny_config().data), b"")


def test_another_encoding_is_taken_only_where_it_saves_time():
    far = Fleet([kind(up_bytes_s=1e9, flops_per_s=1e3)], Server(step_s=1e-3))
    made = options(far)
    assert {choice.encoding for choice in made.choices.values()} == {"float32"}
    assert Choice(next(iter(made.choices)), "int8") not in made.choices.values()
