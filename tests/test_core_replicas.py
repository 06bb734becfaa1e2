"""Steps of several devices as one batch: what is computed together, and that it changes nothing."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from core_support import Desk, play, tiny_config
from torch import nn

from server_node import computing
from server_node.actions import Measure, OpenRound, Step
from server_node.errors import ConfigError
from server_node.half import ServerHalf
from server_node.journal import RoundClosed, read_journal
from server_node.machine import environment
from server_node.prepare import prepare
from server_node.replay import replay
from server_node.torch_directions import TorchSigns
from server_node.torch_half import Turn

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """As a run has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- who is computed together


def test_a_batch_holds_the_next_step_of_each_slot_in_order_of_arrival():
    desk = Desk(devices=tuple(range(5)), participants=5, replicas=2)
    desk.start()
    desk.deliver(2, 4)  # of even rank both: one slot
    assert desk.machine.batch(desk.machine.next_work()) == [Step(2, 0, 0)]
    desk.compute(Step(2, 0, 0))
    desk.deliver(3)
    assert desk.machine.batch(desk.machine.next_work()) == [Step(2, 1, 0), Step(3, 0, 1)]
    desk.compute(Step(2, 1, 0))
    desk.compute(Step(3, 0, 1))
    assert desk.machine.next_work() == Measure(2, 0)  # answers first
    desk.compute(Measure(2, 0))
    first = desk.machine.next_work()
    assert first == Step(4, 0, 0)
    assert sorted(desk.machine.batch(first)) == [Step(3, 1, 1), Step(4, 0, 0)]


def test_slots_are_ranks_among_the_participants():
    """So that the devices of a round share the slots evenly, whoever was drawn."""
    desk = Desk(devices=(10, 20, 30, 40), participants=2, replicas=2, rounds=20)
    actions = desk.start()
    while opened := next((a for a in actions if isinstance(a, OpenRound)), None):
        desk.deliver(*reversed(opened.participants))
        batch = desk.machine.batch(desk.machine.next_work())
        slots = {step.device: step.slot for step in batch}
        assert slots == dict(zip(opened.participants, (0, 1), strict=True))
        actions = desk.compute_all()
    assert len(desk.closed) == 20


def test_a_dropped_device_is_in_no_batch():
    desk = Desk(replicas=3)
    desk.start()
    desk.deliver(0, 1, 2)
    desk.compute(Step(1, 0, 1), poison=float("nan"))
    batch = desk.machine.batch(desk.machine.next_work())
    assert [step.device for step in batch] == [0, 2]


# -- the arithmetic


def convolutions():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 84), nn.Dropout(), nn.Linear(84, 10),
    )  # fmt: skip


class Company:
    """One half of convolutions, four devices with their activations."""

    def __init__(self, replicas, device=CPU, directions=2):
        module = convolutions()
        self.weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy()
        self.half = ServerHalf(
            module, self.weights, run_seed=3, lam=1e-3, directions=directions, device=device,
            replicas=replicas,
        )  # fmt: skip
        self.half.start_round(0, eta=1e-3)
        values = np.random.default_rng(0)
        self.hs = values.standard_normal((4, 8, 6, 14, 14)).astype(np.float32)
        labels = values.integers(0, 10, (4, 8)).astype(np.uint32)
        self.batches = [self.half.place(h, y) for h, y in zip(self.hs, labels, strict=True)]
        self.done = {device: [] for device in range(4)}

    def step(self, *devices, slots=None):
        slots = slots or devices
        turns = [
            Turn(slot, device, self.batches[device], self.done[device])
            for slot, device in zip(slots, devices, strict=True)
        ]
        for turn, row in zip(turns, self.half.steps(turns), strict=True):
            turn.done.append(row)


def test_scalars_do_not_depend_on_who_shares_the_batch_or_joins_it_later():
    """Kernels may depend on how many are computed, so that is the same in every batch too."""
    together, apart = Company(4), Company(4)
    rows = []
    compute = apart.half._outputs
    apart.half._outputs = lambda weights, h: (rows.append(len(weights)), compute(weights, h))[1]
    for _ in range(3):
        together.step(0, 1, 2, 3)
    apart.step(2)
    apart.step(3, 2)
    apart.step(0, 3, 2)
    apart.step(1, 3, 0)
    apart.step(1)
    apart.step(0, 1)
    assert apart.done == together.done
    assert together.done[0] != together.done[1]
    assert set(rows) == {8}  # both sides of four


def test_batched_steps_are_close_to_single_ones():
    batched, single = Company(2), Company(1)
    for pair in ((0, 1), (0, 1), (2, 3)):
        batched.step(*pair, slots=(0, 1))
        for device in pair:
            single.step(device, slots=(0,))
    got, want = (np.array([c.done[d][0] for d in range(4)]) for c in (batched, single))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    assert np.abs(want).max() > 1e-4


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_measurement_leaves_the_copies_and_the_activation_as_they_are(replicas):
    """Device 1 is measured between steps of device 0; the first layer works in place."""
    disturbed, calm = Company(replicas), Company(replicas)
    differences = 0.01 * np.random.default_rng(1).standard_normal((2, 8, 6, 14, 14))
    for company in (disturbed, calm):
        company.step(1, slots=(0,))
    before = disturbed.batches[1].h.clone()
    first = measure(calm, 1, differences)
    for _ in range(2):
        for company in (disturbed, calm):
            company.step(0, slots=(0,))
        assert measure(disturbed, 1, differences) == first
    assert disturbed.done == calm.done
    assert torch.equal(disturbed.batches[1].h, before)
    assert before.min() < 0


def measure(company, device, differences):
    return company.half.measure(
        device, company.batches[device], differences.astype(np.float32), company.done[device]
    )


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_gpus_signs_give_the_same_scalars_on_the_cpu(replicas):
    """What a GPU adds its directions with runs on any torch device."""
    want, got = Company(replicas), Company(replicas)
    got.half._signs = TorchSigns(CPU)
    for company in (want, got):
        company.step(0)
        company.step(*range(replicas))
        company.step(replicas - 1)
    assert got.done == want.done
    assert len(got.done[0]) >= 2


def test_signs_are_the_same_for_more_directions_than_are_kept():
    """The last directions of a step are drawn again for its update."""
    company = Company(1, directions=40)
    for _ in range(2):
        company.step(0)
    fresh = Company(1, directions=40)
    fresh.done[0] = [company.done[0][0]]
    fresh.step(0)  # rebuilt from the first step's scalars
    assert fresh.done == company.done


# -- runs


def scalars(folder):
    records = read_journal(folder / "journal.bin").records
    return [record for record in records if isinstance(record, RoundClosed)]


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batched")
    experiment = prepare(tiny_config("server.replicas=2"), folder)
    play(experiment, folder / "run")
    return experiment, folder


def test_a_batched_run_does_not_depend_on_the_order_of_arrival(batched):
    experiment, folder = batched
    sizes = Counter()
    for seed in range(4):
        other = folder / f"shuffled-{seed}"
        play(experiment, other, random.Random(seed))
        assert scalars(other) == scalars(folder / "run")
        sizes += batch_sizes(other)
    assert sizes[1] > 0 < sizes[2]  # the batches did differ


def batch_sizes(folder):
    """How many batches of each size the trace shows."""
    events = json.loads((folder / "trace.json").read_text())
    return Counter(Counter(e["ts"] for e in events if e["name"] == "step").values())


def test_a_batched_run_replays_and_says_how_it_was_computed(batched):
    _, folder = batched
    result = replay(folder / "run", folder)
    assert result.matches is True
    header = read_journal(folder / "run" / "journal.bin").header
    assert header.server_replicas == 2
    assert header.environment["torch_threads"] == "1"
    assert header.environment["torch_cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_the_trace_shows_each_step_of_a_batch_once_and_slots_apart(batched):
    _, folder = batched
    events = json.loads((folder / "run" / "trace.json").read_text())
    steps = [event for event in events if event["name"] == "step"]
    seen = Counter((e["args"]["round"], e["args"]["device"], e["args"]["step"]) for e in steps)
    assert seen == Counter(
        (number, device, step) for number in range(3) for device in range(3) for step in range(2)
    )
    lanes = Counter((event["tid"], event["ts"]) for event in steps)
    assert set(lanes.values()) == {1}


def test_padding_counts_once_a_batch(tmp_path, monkeypatch):
    """Three devices, two steps each, whose frames are all there: two batches."""
    config = tiny_config(
        "server.replicas=3", "server.min_step_s=1000", "server.threads=2", "run.rounds=1"
    )
    experiment = prepare(config, tmp_path)
    slept = []
    monkeypatch.setattr(computing.time, "sleep", slept.append)
    run = play(experiment, tmp_path / "run")
    assert len(slept) == 2
    assert run.ledger.server_steps == 6
    assert run.header.environment["torch_threads"] == "2"
    assert torch.get_num_threads() == 2  # evaluation leaves them alone


def test_more_replicas_than_devices_of_a_round_are_refused():
    with pytest.raises(ConfigError, match=r"server.replicas: 3 exceed the 2 devices of a round"):
        tiny_config("server.replicas=3", "devices.participants=2")


class Branches(nn.Module):
    """Does what its values say, which no batch can."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_half_that_cannot_be_batched_is_refused():
    half = ServerHalf(
        nn.Sequential(nn.Linear(4, 3), Branches()), np.ones(15, np.float32), run_seed=0, lam=1e-3,
        directions=1, device=CPU, replicas=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"server\.replicas: .*vmap.*replicas=1"):
        half.check_batching((8, 4))


def test_a_half_whose_first_layer_works_in_place_can_be_batched():
    Company(2).half.check_batching((8, 6, 14, 14))


def test_switches_of_the_libraries_are_recorded(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_CBWR", b"\xff".decode(errors="surrogateescape"))
    facts = environment()
    assert facts["OMP_NUM_THREADS"] == "7"
    assert facts["MKL_CBWR"].isascii()
    assert facts["processor"]


# -- CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("replicas", [1, 4])
def test_steps_on_a_gpu_are_close_to_the_cpus(replicas):
    cpu, gpu = Company(1), Company(replicas, torch.device("cuda"))
    for device in range(4):
        cpu.step(device, slots=(0,))
    if replicas == 1:
        for device in range(4):
            gpu.step(device, slots=(0,))
    else:
        gpu.step(0, 1, 2, 3)
    got, want = (np.array([c.done[d][0] for d in range(4)]) for c in (gpu, cpu))
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_run_on_a_gpu_replays_on_the_cpu_and_repeats(tmp_path, replicas):
    config = tiny_config("server.device=cuda", f"server.replicas={replicas}")
    experiment = prepare(config, tmp_path)
    for name in ("once", "again"):
        play(experiment, tmp_path / name, random.Random(name))
    result = replay(tmp_path / "once", tmp_path)
    assert result.matches is True
    assert scalars(tmp_path / "once") == scalars(tmp_path / "again")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("replicas", [1, 4])
def test_a_copy_on_a_gpu_has_the_bits_of_the_cpus_replay(replicas):
    gpu, cpu = Company(replicas, torch.device("cuda")), Company(1)
    for _ in range(3):
        gpu.step(0)
    differences = np.zeros((1, 8, 6, 14, 14))
    for company in (gpu, cpu):
        company.done[0] = gpu.done[0]
        measure(company, 0, differences)  # leaves the copy in the scratch
    assert torch.equal(gpu.half._scratch.cpu(), cpu.half._scratch)
