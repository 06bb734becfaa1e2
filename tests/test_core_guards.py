"""Guards: what each does, that it replays and resumes to the bit, and leaves safe runs alone."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from core_support import play, tiny_config
from test_core_replicas import Company, measure
from test_core_resume import after_round, cut, facts, go_on

from emulation.inprocess import InProcessFleet
from server_node.actions import Outcome
from server_node.backtracking import FRACTIONS, best_fraction
from server_node.checkpoint import load_checkpoint
from server_node.curvature import RULE_LIMIT, trace_of_hessian
from server_node.guards import Guards
from server_node.half import ActivationBatch, ServerHalf, Turn
from server_node.journal import Guarded, RoundClosed, Share, read_journal
from server_node.prepare import open_run, prepare
from server_node.replay import replay
from server_node.sections import GuardsSection
from wire_protocol.manifest import sha256

ALL = ("guards.clip=2", "guards.reject=true", "guards.backtrack_server=true",
       "guards.backtrack_client=true")  # fmt: skip
STEEP = ("run.rounds=5", "method.eta_s=1.5", "method.eta_c=20", "method.tau=4",
         "method.schedule=constant")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return prepare(tiny_config(), tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A run with all guards whose steps are far too large: configuration, folder, run."""
    config = tiny_config(*STEEP, *ALL)
    folder = tmp_path_factory.mktemp("guarded") / "run"
    return config, folder, InProcessFleet(prepare(config, folder)).run()


def records(folder, kind):
    return [r for r in read_journal(folder / "journal.bin").records if isinstance(r, kind)]


def rows(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def with_config(experiment, *overrides):
    return experiment._replace(config=tiny_config(*overrides))


# -- all together


def test_interventions_are_journaled_counted_and_shown(guarded):
    _, folder, run = guarded
    names = {record.guard for record in records(folder, Guarded)}
    assert {"reject", "clip_client", "factor", "loss", "curvature_server"} <= names
    assert "backtrack_server" in names or "backtrack_client" in names
    rejected = sum(r.value for r in records(folder, Guarded) if r.guard == "reject")
    assert rejected == run.guards.totals["reject"] == sum(r["guard_rejected"] for r in rows(folder))
    assert all(math.isfinite(row["pooled_loss"]) for row in rows(folder))
    assert min(row["fraction_client"] for row in rows(folder)) < 1


def test_a_guarded_run_replays_to_the_bit(guarded):
    _, folder, run = guarded
    result = replay(folder, folder)
    assert (result.matches, result.complete) == (True, True)
    assert (result.client_sha256, result.server_sha256) == (
        sha256(run.client_state), sha256(run.server)
    )  # fmt: skip


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_stopped_run_goes_on_with_the_memory_of_its_guards(guarded, tmp_path, number):
    config, folder, whole = guarded
    copy = shutil.copytree(folder, tmp_path / "run")
    cut(copy / "journal.bin", after_round(copy / "journal.bin", number))
    resumed, _ = go_on(config, copy)
    assert facts(copy) == facts(folder)
    assert resumed.guards.totals == whole.guards.totals


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_guarded_run_does_not_depend_on_the_order_of_arrival(tmp_path, replicas):
    experiment = prepare(tiny_config(*STEEP, *ALL, f"server.replicas={replicas}"), tmp_path)
    play(experiment, tmp_path / "run")
    for seed in range(2):
        other = tmp_path / f"shuffled-{seed}"
        play(experiment, other, random.Random(seed))
        assert records(other, RoundClosed) == records(tmp_path / "run", RoundClosed)
    assert replay(tmp_path / "run", tmp_path).matches is True


def test_guards_leave_a_safe_run_as_it_is(experiment, tmp_path):
    plain = play(with_config(experiment, "guards.patience=0"), tmp_path / "plain")
    same = play(with_config(experiment, "guards.reject=true", "guards.backtrack_server=true",
                            "guards.clip=1000"), tmp_path / "guarded")  # fmt: skip
    assert sha256(same.server) == sha256(plain.server)
    assert sha256(same.client) == sha256(plain.client)
    assert not sum(same.guards.totals.values())
    assert not same.guards.harmful


# -- rejection


class Guardians(Company):
    """Four devices whose steps are judged."""

    def __init__(self, replicas, eta=1e-3, **rules):
        super().__init__(replicas)
        self.half.start_round(0, eta)
        self.guards = Guards(GuardsSection(reject=True, **rules))

    def step(self, *devices, slots=None):
        slots = slots or devices
        turns = [
            Turn(slot, device, self.batches[device], self.done[device])
            for slot, device in zip(slots, devices, strict=True)
        ]
        for turn, row in zip(turns, self.half.steps(turns, self.guards), strict=True):
            turn.done.append(row)


def test_a_step_that_raises_its_own_loss_is_taken_back_and_the_next_is_smaller():
    company = Guardians(1, eta=0.5)
    for _ in range(8):
        company.step(0)
    zeros = company.done[0].count([0.0, 0.0])
    counts = {g.guard: g.value for g in company.guards.report(0, [0], {})}
    assert counts["reject"] == zeros > 0
    assert counts["factor"] < 1


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_copy_rebuilt_from_its_scalars_has_the_bits_of_the_judged_one(replicas):
    company, fresh = Guardians(replicas, eta=0.1), Company(replicas)
    fresh.half.start_round(0, 0.1)
    for _ in range(4):
        company.step(0)
    fresh.done[0] = company.done[0]
    assert [0.0, 0.0] in company.done[0]
    difference = np.zeros((1, 8, 6, 14, 14))
    for each in (company, fresh):
        measure(each, 0, difference)  # leaves the copy in the scratch
    assert torch.equal(company.half._scratch, fresh.half._scratch)


def test_judgements_do_not_depend_on_who_shares_the_batch():
    together, apart = Guardians(4, eta=0.1), Guardians(4, eta=0.1)
    for _ in range(3):
        together.step(0, 1, 2, 3)
    for device in (2, 0, 3, 1):
        for _ in range(3):
            apart.step(device)
    assert apart.done == together.done
    assert any([0.0, 0.0] in done for done in together.done.values())


def test_judging_changes_no_bit_of_steps_that_are_accepted():
    judged, plain = Guardians(2), Company(2)
    for _ in range(3):
        for company in (judged, plain):
            company.step(0, 1)
    assert judged.done == plain.done


def test_scalars_that_are_not_finite_become_a_rejected_step():
    guards = Guards(GuardsSection(reject=True))
    assert guards.shape(3, [], [math.nan, 1.0]) == [0.0, 0.0]
    assert not guards.accepts(3, math.nan, 1.0)
    assert guards.shape(3, [[0.0, 0.0]], [1.0, -3.0]) == [0.5, -1.5]
    assert math.isnan(Guards(GuardsSection()).shape(3, [], [math.nan])[0])  # as ever: dropped


# -- clipping


def closed(number, server=(), client=()):
    share = Share(0, 1.0, np.asarray(client, "<f4").tobytes(), 1.0,
                  np.asarray(server, "<f4").tobytes(), 1)  # fmt: skip
    return RoundClosed(number, 0.1, 0.1, 1.0, [share])


def test_scalars_are_cut_down_to_the_limit_of_their_half_and_keep_their_signs():
    guards = Guards(GuardsSection(clip=2.0), [closed(0, [1.0, -1.0, 1.0], [10.0, 0.0, -10.0])])
    assert guards.shape(0, [], [-5.0]) == [-2.0]
    assert guards.shape(0, [[-2.0]], [1.5]) == [1.5]
    assert guards.clip_client(0, [25.0, -19.0]) == [20.0, -19.0]
    counts = {g.guard: g.value for g in guards.report(1, [0], {})}
    assert counts == {"clip_server": 1, "clip_client": 1}


def test_before_any_round_the_limit_is_that_of_the_devices_own_steps():
    guards = Guards(GuardsSection(clip=2.0))
    assert guards.shape(0, [], [5.0]) == [5.0]
    assert guards.shape(0, [[5.0], [1.0], [1.0]], [5.0]) == [2.0]


# -- backtracking


@pytest.mark.parametrize(("best", "chosen"), [(1.0, 1.0), (0.3, 0.25), (-1.0, 0.0)])
def test_the_fraction_with_the_lowest_loss_is_taken(best, chosen):
    assert best_fraction(lambda f: (f - best) ** 2) == chosen


def test_losses_that_are_not_finite_are_never_taken_and_ties_go_to_the_whole_step():
    assert best_fraction(lambda f: math.nan if f > 0.3 else -f) == 0.25
    assert best_fraction(lambda _: math.inf) == 0.0
    assert best_fraction(lambda _: 1.0) == FRACTIONS[0] == 1.0


@pytest.mark.parametrize(
    ("guard", "step"), [("server", "method.eta_s=1.5"), ("client", "method.eta_c=20")]
)
def test_backtracking_shortens_the_step_of_its_half_alone(experiment, tmp_path, guard, step):
    config = ("method.schedule=constant", "run.rounds=4", step, f"guards.backtrack_{guard}=true")
    run = play(with_config(experiment, *config), tmp_path / "run")
    other = {"server": "client", "client": "server"}[guard]
    shown = rows(tmp_path / "run")
    assert min(row[f"fraction_{guard}"] for row in shown) < 1
    assert {row[f"fraction_{other}"] for row in shown} == {1.0}
    fractions = [row[f"fraction_{guard}"] for row in shown]
    shares = [record.shares for record in records(tmp_path / "run", RoundClosed)]
    field = {"server": "server_weight", "client": "weight"}[guard]
    assert [{getattr(s, field) for s in each} for each in shares] == [{f / 3} for f in fractions]
    assert run.guards.totals[f"backtrack_{guard}"] > 0


def test_weights_that_are_not_finite_never_reach_the_base(experiment, tmp_path):
    """Finite scalars times an enormous step: the last good weights stay, and the run ends."""
    config = ("method.eta_s=1e30", "method.lam=1e-9", "method.tau=1", "run.rounds=20")
    run = play(with_config(experiment, *config), tmp_path / "run")
    assert np.isfinite(run.server).all()
    assert np.isfinite(run.client).all()
    assert run.finished.outcome is Outcome.DIVERGED


# -- the delayed guard of the client's step


def losses(*values):
    """Records of rounds with these pooled losses."""
    found = []
    for number, value in enumerate(values):
        found += [Guarded(number, -1, "loss", value), closed(number)]
    return found


def test_the_client_step_halves_after_a_jump_of_the_loss_and_recovers():
    rules = GuardsSection(backtrack_client=True, diverged_factor=3.0)
    guards = Guards(rules, losses(1.0, 1.0, 1.0))
    seen = []
    for number, loss in enumerate((5.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0), 3):
        guards.observe(0, loss)
        factor = guards.adapt_client([0])
        found = {"client_factor": factor, **guards.losses([0])}
        guards.closed(closed(number), guards.report(number, [0], found))
        seen.append(factor)
    assert seen == [0.5, 0.25, 0.3125, 0.390625, 0.48828125, 0.6103515625, 0.762939453125]
    assert guards.totals["client_factor"] == 7


def test_the_server_step_halves_after_harm_on_fresh_activations_and_recovers():
    guards = Guards(GuardsSection(backtrack_server=True))
    seen = []
    # Losses at the round's weights against those before: a rise of 0.4 % passes, nan never.
    for number, loss in enumerate((2.0, math.nan, 1.004, 0.5, 1.0, 1.0, 1.0, 1.0)):
        factor = guards.adapt_server(loss, 1.0)
        guards.closed(closed(number), guards.report(number, [0], {"server_factor": factor}))
        seen.append(factor)
    assert seen == [0.5, 0.25, 0.3125, 0.390625, 0.48828125, 0.6103515625, 0.762939453125,
                    0.95367431640625]  # fmt: skip
    assert guards.totals["server_factor"] == 7  # the first step was a whole one


def test_a_server_step_that_does_harm_on_fresh_activations_makes_the_next_smaller(guarded):
    _, folder, run = guarded
    factors = [row["factor_server"] for row in rows(folder)]
    told = {r.round: r.value for r in records(folder, Guarded) if r.guard == "server_factor"}
    assert factors == [1.0, *(told.get(number, 1.0) for number in range(len(factors) - 1))]
    assert min(factors) < 1
    steps = [record.eta_s for record in records(folder, RoundClosed)]
    assert steps == [run.config.method.eta_s * factor for factor in factors]


# -- early ends


def test_a_loss_far_above_its_best_for_long_ends_the_run():
    rules, good = GuardsSection(patience=3, diverged_factor=2.0), [1.0] * 8
    assert not Guards(rules, losses(*good, *[5.0] * 3)).doubtful  # the median is still good
    assert Guards(rules, losses(*good, *[5.0] * 5)).doubtful
    assert not Guards(rules, losses(*good, *[5.0] * 5)).diverged
    assert "smaller steps" in Guards(rules, losses(*good, *[5.0] * 6)).diverged
    assert Guards(rules, losses(*good, *[math.nan] * 3)).diverged
    assert not Guards(rules, losses(*good, *[5.0] * 5, *good)).doubtful
    assert not Guards(GuardsSection(patience=0), losses(*good, *[5.0] * 99)).diverged


def test_luck_of_a_small_pool_is_no_measure():
    assert not Guards(GuardsSection(patience=2), losses(2.3, 1e-4, 0.3, 0.4, 0.5, 0.6)).doubtful


def test_a_run_that_falls_apart_ends_early_and_keeps_its_last_good_checkpoint(experiment, tmp_path):
    config = ("run.rounds=60", "evaluation.every=1", "method.schedule=constant",
              "method.eta_s=2", "method.eta_c=0", "method.tau=4", "guards.patience=3",
              "guards.diverged_factor=1.5")  # fmt: skip
    run = play(with_config(experiment, *config), tmp_path / "run")
    assert run.finished.outcome is Outcome.DIVERGED
    assert "guards" in run.finished.detail
    assert run.rounds_closed < 60
    assert load_checkpoint(tmp_path / "run").next_round <= run.rounds_closed - 3


# -- curvature


def test_the_trace_is_that_of_the_hessian():
    torch.manual_seed(0)
    h, labels = torch.randn(64, 6), torch.randint(0, 4, (64,))
    module = torch.nn.Linear(6, 4)
    weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    p = torch.softmax(module(h).detach(), dim=1)
    want = float(((p * (1 - p)).sum(1) * (h.square().sum(1) + 1)).mean())
    half = ServerHalf(
        module, weights.numpy(), run_seed=0, lam=1e-3, directions=1, device=torch.device("cpu")
    )
    got = trace_of_hessian(half, [ActivationBatch(h, labels)])
    assert got == pytest.approx(want, rel=0.15)


@pytest.mark.parametrize(("eta_s", "warned"), [(0.015, 0), (50.0, 1)])
def test_a_step_beyond_the_rule_is_warned_of_once(experiment, tmp_path, monkeypatch, eta_s, warned):
    events = []
    monkeypatch.setattr(
        "emulation.inprocess.open_run",
        lambda *args, **named: open_run(*args, **{**named, "notify": events.append}),
    )
    config = tiny_config(f"method.eta_s={eta_s}", "guards.backtrack_server=true")
    run = InProcessFleet(experiment._replace(config=config, folder=tmp_path)).run()
    texts = [event["text"] for event in events if event["event"] == "warning"]
    assert len(texts) == warned
    assert all("method.eta_s" in text and "trace" in text for text in texts)
    assert (run.guards.curvature * eta_s > RULE_LIMIT) == bool(warned)
