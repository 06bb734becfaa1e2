"""Replay: bundle, server half and journal give the bits of the live run, or say they do not."""

import contextlib
import random
import shutil
import struct

import msgspec
import pytest
from core_support import play, tiny_config

from server_node.errors import JournalError
from server_node.journal import (
    Digests,
    Ended,
    JournalWriter,
    RoundClosed,
    read_journal,
)
from server_node.prepare import prepare
from server_node.replay import replay
from wire_protocol.errors import InputError
from wire_protocol.manifest import sha256


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A finished run and its folder."""
    folder = tmp_path_factory.mktemp("live") / "run"
    experiment = prepare(tiny_config("method.directions_server=2"), folder)
    return play(experiment._replace(folder=folder), folder / "journal"), folder


@pytest.fixture
def copy(live, tmp_path):
    """A folder that holds client/, server/ and journal.bin of the run, and nothing else."""
    _, folder = live
    shutil.copytree(folder / "client", tmp_path / "client")
    shutil.copytree(folder / "server", tmp_path / "server")
    shutil.copy(folder / "journal" / "journal.bin", tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Replace the journal by one with valid checksums; `change` maps a record to its successor."""
    path = folder / "journal.bin"
    header, records, _ = read_journal(path)
    path.unlink()
    writer = JournalWriter(path, header)
    for record in records:
        changed = change(record)
        if changed is not None:
            writer.append(changed)
    writer.close()


def first_share(folder):
    records = read_journal(folder / "journal.bin").records
    return next(r for r in records if isinstance(r, RoundClosed)).shares[0]


def flipped(scalars):
    """The bytes with the upper mantissa bit of their first float32 flipped."""
    return scalars[:2] + bytes([scalars[2] ^ 0x40]) + scalars[3:]


def test_replay_gives_the_bits_of_the_live_run(live, copy):
    run, _ = live
    result = replay(copy, copy)
    assert result[:6] == (3, sha256(run.client), sha256(run.server), True, True, [])
    assert (result.server_first_round, result.server_rounds) == (0, 3)


def test_replay_writes_nothing(copy):
    before = sorted(path.name for path in copy.rglob("*"))
    replay(copy, copy)
    assert sorted(path.name for path in copy.rglob("*")) == before


def test_control_run_replays_with_the_halves_of_its_experiment(tmp_path):
    experiment = prepare(tiny_config(), tmp_path)
    run = play(experiment, tmp_path / "again", frozen=True)
    result = replay(tmp_path / "again" / "control", tmp_path)
    assert result[:6] == (3, sha256(run.client), sha256(run.server), True, True, [])


@pytest.mark.parametrize("half", ["client", "server"])
def test_a_scalar_altered_in_the_file_is_told_twice(live, copy, half):
    run, _ = live
    path = copy / "journal.bin"
    scalars = getattr(first_share(copy), f"{half}_scalars")
    path.write_bytes(path.read_bytes().replace(scalars, flipped(scalars), 1))
    result = replay(copy, copy)
    assert result.matches is False
    assert getattr(result, f"{half}_sha256") != sha256(getattr(run, half))
    assert any("altered" in note for note in result.notes)
    assert any("digests differ" in note for note in result.notes)


@pytest.mark.parametrize("half", ["client", "server"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_forged_scalar_with_a_valid_checksum_does_not_match(live, copy, half, number):
    run, _ = live
    field = f"{half}_scalars"

    def forge(record):
        if not isinstance(record, RoundClosed) or record.round != number:
            return record
        share = record.shares[-1]
        share = msgspec.structs.replace(share, **{field: flipped(getattr(share, field))})
        return msgspec.structs.replace(record, shares=[*record.shares[:-1], share])

    rewrite(copy, forge)
    result = replay(copy, copy)
    assert result.matches is False
    other = {"client": "server", "server": "client"}[half]
    assert getattr(result, f"{half}_sha256") != sha256(getattr(run, half))
    assert getattr(result, f"{other}_sha256") == sha256(getattr(run, other))


def test_a_missing_round_is_refused(copy):
    rewrite(copy, lambda r: None if isinstance(r, RoundClosed) and r.round == 1 else r)
    with pytest.raises(JournalError, match="round 1 is missing"):
        replay(copy, copy)


def test_journal_cut_before_its_end_replays_its_rounds_and_is_not_complete(copy):
    rewrite(copy, lambda r: None if isinstance(r, Digests | Ended) else r)
    result = replay(copy, copy)
    assert (result.rounds, result.matches, result.complete) == (3, None, False)


def test_forged_digest_is_noticed_even_when_a_later_one_is_right(copy):
    def forge(record):
        wrong = isinstance(record, Digests) and record.next_round == 2
        return msgspec.structs.replace(record, client_sha256="0" * 64) if wrong else record

    rewrite(copy, forge)
    assert replay(copy, copy).matches is False


@pytest.mark.parametrize("half", ["client", "server"])
def test_another_export_is_refused(copy, tmp_path_factory, half):
    other = tmp_path_factory.mktemp("other")
    prepare(tiny_config("run.seed=1"), other)
    shutil.rmtree(copy / half)
    shutil.copytree(other / half, copy / half)
    with pytest.raises(JournalError, match="another"):
        replay(copy, copy)


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
@pytest.mark.parametrize(
    "name", ["client/manifest.json", "client/weights.bin", "server/weights.bin"]
)
def test_damaged_half_is_refused_in_one_line(copy, name, damage):
    path = copy / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-7] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError) as caught:
        replay(copy, copy)
    assert str(path) in str(caught.value) or str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"directions_server": 0},
        {"directions_server": 3},
        {"server_scalars": b"12345"},
        {"client_scalars": b"12345"},
        {"device": -1},
        {"device": 1 << 32},
    ],
    ids=str,
)
def test_share_that_makes_no_sense_is_refused_as_a_journal_error(copy, nonsense):
    def forge(record):
        if not isinstance(record, RoundClosed):
            return record
        share = msgspec.structs.replace(record.shares[0], **nonsense)
        return msgspec.structs.replace(record, shares=[share])

    rewrite(copy, forge)
    with pytest.raises(JournalError):
        replay(copy, copy)


def test_replay_of_an_altered_journal_reports_or_refuses_but_never_crashes(copy):
    """One flipped bit in every other byte after the header; checksums catch it."""
    path = copy / "journal.bin"
    data = path.read_bytes()
    dice = random.Random(0)
    (header,) = struct.unpack_from("<I", data, 8)
    for position in range(16 + header, len(data), 2):
        altered = bytearray(data)
        altered[position] ^= 1 << dice.randrange(8)
        path.write_bytes(altered)
        with contextlib.suppress(JournalError):
            assert replay(copy, copy).notes, f"byte {position}"
