"""The journal file: round trip, truncation at every byte, altered bytes, its size."""

import os
import random
import struct
import zlib

import pytest

from server_node.errors import JournalError
from server_node.journal import (
    DeviceJoined,
    Digests,
    Ended,
    Guarded,
    Header,
    JournalWriter,
    RoundClosed,
    Share,
    read_journal,
)

HEADER = Header(
    run=(1 << 63) - 1, run_seed=3, lam=1e-3, manifest_sha256="a" * 64,
    server_weights_sha256="b" * 64, config_sha256="c" * 64, server_device="cpu",
    server_threads=1, server_replicas=1, environment={"numpy": "2.0", "machine": "é"},
    client_optimiser="adam", momentum=0.9, beta2=0.999,
)  # fmt: skip
SHARE = Share(
    1, 0.5, struct.pack("<2f", 0.25, -1e-7), 0.5, struct.pack("<3f", 1.0, 2.0, 3.0), 1
)  # fmt: skip
RECORDS = [
    DeviceJoined(0, "device-000"),
    RoundClosed(0, 0.2, 0.02, 1.0, [SHARE, SHARE]),
    RoundClosed(1, 0.1, 0.01, 1.0, []),
    Guarded(1, -1, "clip", 0.5),
    Digests(2, "d" * 64, "e" * 64),
    Ended("complete"),
]


@pytest.fixture
def journal(tmp_path):
    return write(tmp_path / "journal.bin", RECORDS)


def write(path, records, header=HEADER):
    writer = JournalWriter(path, header)
    for record in records:
        writer.append(record)
    writer.close()
    return path


def boundaries(data):
    """Lengths of the file at which it ends with a whole record; the first is the header's."""
    position, ends = 8, []
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position)
        position += 8 + length
        ends.append(position)
    return ends


def test_what_was_appended_is_read_back(journal):
    assert read_journal(journal) == (HEADER, RECORDS, [])


def test_every_record_is_on_disk_when_append_returns(tmp_path):
    writer = JournalWriter(tmp_path / "journal.bin", HEADER)
    for count, record in enumerate(RECORDS, 1):
        writer.append(record)
        assert read_journal(tmp_path / "journal.bin").records == RECORDS[:count]
    writer.close()


def test_an_existing_journal_is_never_opened_for_writing(journal):
    before = journal.read_bytes()
    with pytest.raises(FileExistsError):
        JournalWriter(journal, HEADER)
    assert journal.read_bytes() == before


def test_the_file_starts_with_magic_and_version_then_length_and_checksum(journal):
    data = journal.read_bytes()
    length, crc = struct.unpack_from("<II", data, 8)
    assert data[:8] == b"MUSJ\x02\0\0\0"
    assert zlib.crc32(data[16 : 16 + length]) == crc


def test_truncated_at_any_byte_gives_the_whole_records_before_and_says_so(journal):
    data = journal.read_bytes()
    ends = boundaries(data)
    assert len(ends) == 1 + len(RECORDS)
    for size in range(len(data)):
        journal.write_bytes(data[:size])
        if size < ends[0]:
            with pytest.raises(JournalError) as caught:
                read_journal(journal)
            assert "\n" not in str(caught.value)
            continue
        header, records, damage = read_journal(journal)
        assert header == HEADER
        assert records == RECORDS[: sum(size >= end for end in ends) - 1]
        assert len(damage) == (size not in ends)


def test_a_flipped_bit_anywhere_is_noticed(journal):
    with journal.open("r+b", buffering=0) as file:
        for position, byte in enumerate(journal.read_bytes()):
            for altered in [*(byte ^ 1 << bit for bit in range(8)), byte]:
                os.pwrite(file.fileno(), bytes([altered]), position)
                try:
                    damage = read_journal(journal).damage
                except JournalError as error:
                    damage = [str(error)]
                assert bool(damage) == (altered != byte), f"{altered} in place of byte {position}"
                assert "\n" not in "".join(damage[:1])


def test_altered_record_that_still_decodes_is_kept_and_reported(journal):
    data = bytearray(journal.read_bytes())
    data[data.index(SHARE.client_scalars) + 2] ^= 0x40
    journal.write_bytes(data)
    _, records, damage = read_journal(journal)
    assert records[1].shares[0].client_scalars != SHARE.client_scalars
    assert records[2:] == RECORDS[2:]
    assert len(damage) == 1
    assert "record 3" in damage[0]


@pytest.mark.parametrize(
    "data",
    [b"", b"MUSJ", b"MUSJ\x01\0\0\0", b"PK\x03\x04" * 9, b"MUSJ\x02\0\0\0" + b"\xff" * 64],
    ids=["empty", "cut magic", "another version", "another format", "absurd length"],
)
def test_what_is_no_journal_is_refused(tmp_path, data):
    (tmp_path / "journal.bin").write_bytes(data)
    with pytest.raises(JournalError, match=r"journal\.bin"):
        read_journal(tmp_path / "journal.bin")


def test_missing_journal_is_refused(tmp_path):
    with pytest.raises(JournalError, match="cannot be read"):
        read_journal(tmp_path / "journal.bin")


def test_random_bytes_after_the_magic_never_crash_the_reader(tmp_path):
    path = tmp_path / "journal.bin"
    dice = random.Random(0)
    for _ in range(300):
        body = dice.randbytes(dice.randrange(60))
        record = struct.pack("<II", len(body), zlib.crc32(body)) + body
        path.write_bytes(b"MUSJ\x02\0\0\0" + record)
        with pytest.raises(JournalError):
            read_journal(path)


@pytest.mark.parametrize(("directions", "tau"), [(1, 1), (16, 16)])
def test_a_commit_costs_at_most_16_bytes_a_scalar_and_256_more(tmp_path, directions, tau):
    def size(rounds):
        shares = [
            Share(
                device,
                1 / 8,
                b"\xff\xff\x7f\x7f" * directions,
                1 / 8,
                b"\xff\xff\x7f\x7f" * tau,
                1,
            )
            for device in range(8)
        ]
        records = [RoundClosed(1 << 30, 0.2, 0.02, 1.0, shares)] * rounds
        return write(tmp_path / f"{rounds}.bin", records).stat().st_size

    assert size(2) - size(1) <= 16 * 8 * (directions + tau) + 256
