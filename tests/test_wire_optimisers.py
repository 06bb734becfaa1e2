"""Client optimisers: steps by their formulas, the same bits for device, server and replay."""

import hashlib

import numpy as np
import pytest

from wire_protocol.client_optimiser import ClientRule, ClientState
from wire_protocol.directions import DirectionGenerator, DirectionId, Stream
from wire_protocol.errors import MessageError
from wire_protocol.messages import Commit, Entry, decode_down, encode

RUN_SEED, LAM, SIZE, ETA = 7, 1e-3, 300, 0.05


def commits(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        Commit(
            1, number, ETA / (1 + number), 0.5,
            [Entry(device, 0.5, random.normal(0, 1e-3, 3).astype("<f4").tobytes(), staleness)
             for device, staleness in ((0, 0), (4, number))],
        )
        for number in range(count)
    ]  # fmt: skip


def gradient(commit):
    """The estimate in float64, straight from the definition; eta_g and weights included."""
    total = np.zeros(SIZE)
    for entry in commit.entries:
        for k, delta in enumerate(np.frombuffer(entry.scalars, "<f4").astype(np.float64)):
            drawn = commit.round - entry.staleness
            u = DirectionGenerator().signs(
                DirectionId(RUN_SEED, Stream.CLIENT_HALF, entry.device, drawn, 0, k), 0, SIZE
            )
            total += commit.eta_g * entry.weight * delta / (2 * LAM) / 3 * u
    return total


def stepped(rule, steps):
    state = ClientState(rule, np.linspace(-1, 1, SIZE, dtype=np.float32))
    for commit in commits(steps):
        state.apply(commit, RUN_SEED, LAM, DirectionGenerator())
    return state


def test_momentum_is_the_heavy_ball():
    theta, velocity = np.linspace(-1, 1, SIZE), np.zeros(SIZE)
    for commit in commits(6):
        velocity = 0.8 * velocity - commit.eta_c * gradient(commit)
        theta = theta + velocity
    have = stepped(ClientRule("momentum", 0.8, 0.0), 6)
    np.testing.assert_allclose(have.theta, theta, atol=1e-5)
    np.testing.assert_allclose(have.state[SIZE:], velocity, atol=1e-5)


def test_adam_is_adam():
    theta, first, second = np.linspace(-1, 1, SIZE), np.zeros(SIZE), np.zeros(SIZE)
    for t, commit in enumerate(commits(6), 1):
        g = gradient(commit)
        first = 0.9 * first + 0.1 * g
        second = 0.99 * second + 0.01 * g * g
        ratio = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.99**t)) + 1e-8)
        theta = theta - commit.eta_c * ratio
    have = stepped(ClientRule("adam", 0.9, 0.99), 6)
    np.testing.assert_allclose(have.theta, theta, atol=1e-4)
    np.testing.assert_allclose(-have.state[SIZE : 2 * SIZE], first, atol=1e-4)


@pytest.mark.parametrize(
    ("optimiser", "digest"),
    [("sgd", "7b69f011cb627863"), ("momentum", "a26566f75ca4d776"), ("adam", "0ab7275a67f7678e")],
)
def test_the_bits_of_a_state_are_fixed(optimiser, digest):
    """Golden bits: another machine, or another numpy, must get these."""
    state = stepped(ClientRule(optimiser, 0.9, 0.999), 20).state
    assert hashlib.sha256(state.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_a_copied_or_carried_state_goes_on_to_the_same_bits(optimiser):
    rule = ClientRule(optimiser, 0.9, 0.999)
    whole, early = stepped(rule, 8), stepped(rule, 5)
    carried = ClientState(rule, np.zeros(SIZE, np.float32))
    carried.state[...] = early.state
    for twin in (early.copy(), carried):
        for commit in commits(8)[5:]:
            twin.apply(commit, RUN_SEED, LAM, DirectionGenerator())
        assert twin.state.tobytes() == whole.state.tobytes()


def test_sgd_keeps_nothing_but_the_weights():
    state = stepped(ClientRule("sgd", 0.9, 0.999), 2)
    assert state.state.nbytes == state.theta.nbytes == 4 * SIZE


@pytest.mark.parametrize("weight", [1.0, -0.0])  # -0.0 + 0.0 would be another bit pattern
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_a_frozen_half_stands_still(optimiser, weight):
    weights = np.full(SIZE, weight, np.float32)
    state = ClientState(ClientRule(optimiser, 0.9, 0.999), weights)
    state.apply(Commit(1, 0, 0.1, 1.0, [Entry(0, 1.0, b"")]), 7, LAM, DirectionGenerator())
    assert state.theta.tobytes() == weights.tobytes()


def test_an_entry_older_than_the_run_is_refused():
    with pytest.raises((MessageError, ValueError), match="staleness"):
        decode_down(encode(Commit(1, 2, 0.1, 1.0, [Entry(0, 1.0, b"", 3)])))
