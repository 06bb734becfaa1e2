"""Files of a device: saved weights, shards, bundles. Damage is told, and never taken for data."""

import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from edge_client.bundle import read_bundle
from edge_client.errors import BundleError, ShardError, StateError
from edge_client.session import ClientSession
from edge_client.shard import Shard, check_shard, load_shard
from edge_client.state import SavedWeights, StateStore
from export.exporter import export_model
from wire_protocol.errors import InputError
from wire_protocol.manifest import parse_manifest, sha256
from wire_protocol.messages import CHUNK_BYTES, Chunk

SAVED = SavedWeights((1 << 63) - 1, 12, np.linspace(-1, 1, 50, dtype=np.float32))


@pytest.fixture
def store(tmp_path):
    store = StateStore(tmp_path / "state")
    yield store
    store.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return export_model("mlp:12-8-4", "fc1", tmp_path_factory.mktemp("export"), seed=0).client


# -- saved weights


def load(store):
    return store.load_weights(np.empty_like(SAVED.weights))


def test_weights_are_read_back_as_saved(store):
    assert load(store) is None
    store.save_weights(SAVED)
    run, next_round, weights = load(store)
    assert (run, next_round) == SAVED[:2]
    assert weights.tobytes() == SAVED.weights.tobytes()


def test_a_later_save_replaces_the_earlier_and_leaves_no_other_file(store):
    store.save_weights(SAVED)
    store.save_weights(SAVED._replace(next_round=13))
    assert load(store).next_round == 13
    assert sorted(p.name for p in store.folder.iterdir()) == ["bundles", "lock", "weights.state"]


def test_a_save_that_is_cut_off_keeps_the_old_weights(store, monkeypatch):
    """Power goes while the new file is written: before the rename, only the old one counts."""
    store.save_weights(SAVED)

    def no_power(_):
        raise OSError(5, "power cut")

    monkeypatch.setattr("os.fsync", no_power)
    with pytest.raises(StateError, match="power cut"):
        store.save_weights(SAVED._replace(next_round=13))
    assert load(store).next_round == 12


def test_weights_truncated_at_any_byte_are_no_weights(store):
    store.save_weights(SAVED)
    path = store.folder / "weights.state"
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert load(store) is None, size
    path.write_bytes(data + b"\0")
    assert load(store) is None


@pytest.mark.parametrize("count", [0, 1, 49, 51])
def test_weights_of_another_number_are_no_weights(store, count):
    store.save_weights(SAVED)
    assert store.load_weights(np.empty(count, np.float32)) is None


def test_weights_with_any_byte_altered_are_no_weights(store):
    store.save_weights(SAVED)
    path = store.folder / "weights.state"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        assert load(store) is None, position


def test_a_folder_serves_one_program_at_a_time(store):
    with pytest.raises(StateError, match="another device program"):
        StateStore(store.folder)
    store.close()
    StateStore(store.folder).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file"):
        StateStore(tmp_path / "file" / "state")


# -- fetched bundles


NAMES = ("manifest.json", "client.onnx", "weights.bin")


def begin(store, client):
    digest = read_bundle(client).digest
    return store.fetch_bundle(digest, (client / "manifest.json").stat().st_size)


def answer(fetch, blobs, stop=10**9):
    """Answer requests until the bundle, or `stop` chunks, are there."""
    while stop > 0 and (request := fetch.next_request()) is not None:
        for index in range(request.first, min(request.first + request.count, stop)):
            data = blobs[request.digest][index * CHUNK_BYTES :][:CHUNK_BYTES]
            assert fetch.take(Chunk(request.digest, index, data))
            stop -= 1


def blobs(client):
    return {sha256(data): data for data in ((client / name).read_bytes() for name in NAMES)}


def fetched(store, client):
    fetch = begin(store, client)
    answer(fetch, blobs(client))
    assert fetch.complete
    return store.load_bundle(read_bundle(client).digest)


def test_a_fetched_bundle_is_kept_under_its_digest(store, client):
    bundle = fetched(store, client)
    assert bundle.digest == read_bundle(client).digest
    assert sorted(path.name for path in bundle.folder.iterdir()) == sorted(NAMES)
    assert all((bundle.folder / n).read_bytes() == (client / n).read_bytes() for n in NAMES)
    assert store.load_bundle("0" * 64) is None


def test_only_the_latest_bundles_are_kept(store, client):
    for number in range(5):
        folder = store.folder / "bundles" / f"{number}"
        folder.mkdir()
        os.utime(folder, (number, number))
    fetched(store, client)
    names = {path.name for path in (store.folder / "bundles").iterdir()}
    assert names == {"3", "4", read_bundle(client).digest}


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_bundle_that_is_not_whole_is_no_bundle_and_is_fetched_again(store, client, stop):
    """The program dies after the manifest, or after the graph."""
    fetch = begin(store, client)
    answer(fetch, blobs(client), stop)
    fetch.discard()
    assert store.load_bundle(read_bundle(client).digest) is None
    assert fetched(store, client) is not None


def test_a_bundle_whose_disk_is_full_is_a_state_error(store, client, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    fetch = begin(store, client)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="No space left"):
        answer(fetch, blobs(client))
    fetch.discard()
    assert store.load_bundle(read_bundle(client).digest) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_fetched_bundle_that_was_damaged_since_is_not_used(store, client, name):
    path = fetched(store, client).folder / name
    path.write_bytes(path.read_bytes()[:-1])
    assert store.load_bundle(read_bundle(client).digest) is None


@pytest.mark.parametrize("change", [lambda data: data[:-4], lambda data: b"\1" + data[1:]])
def test_weights_that_change_after_the_check_are_not_used(client, tmp_path, change):
    folder = tmp_path / "bundle"
    shutil.copytree(client, folder)
    bundle = read_bundle(folder)
    assert bundle.initial_parameters().tobytes() == (client / "weights.bin").read_bytes()
    path = folder / "weights.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleError, match=r"weights\.bin: changed"):
        bundle.initial_parameters()
    path.unlink()
    with pytest.raises(BundleError, match=r"weights\.bin: cannot be read"):
        ClientSession(bundle, 1, 1)


def test_another_valid_bundle_under_that_digest_is_not_used(store, client):
    shutil.move(fetched(store, client).folder, store.folder / "bundles" / ("1" * 64))
    assert store.load_bundle("1" * 64) is None


def test_a_bundle_that_cannot_be_kept_is_a_state_error(store, client):
    (store.folder / "bundles" / read_bundle(client).digest).write_text("in the way")
    with pytest.raises(StateError):
        begin(store, client)


DAMAGE = {
    "empty": lambda data: data[:0],
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "altered": lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
}


@pytest.mark.parametrize("change", ["missing", *DAMAGE])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_bundle_is_refused_by_file_in_one_line(client, tmp_path, name, change):
    folder = tmp_path / "bundle"
    shutil.copytree(client, folder)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change != "missing":
        (folder / name).write_bytes(DAMAGE[change](data))
    with pytest.raises(BundleError, match=name) as caught:
        read_bundle(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_says_something_else_has_another_digest(client, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(client, folder)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"fc1"', b'"fc2"', 1))
    assert read_bundle(folder).digest != read_bundle(client).digest


# -- shards


def write_shard(path, **arrays):
    shard = {"x": np.ones((6, 3, 4), np.uint8), "y": np.arange(6) % 4, "shard_index": 2}
    np.savez(path, **{k: v for k, v in {**shard, **arrays}.items() if v is not None})
    return path


def test_a_shard_is_read_with_its_place(tmp_path):
    shard = load_shard(write_shard(tmp_path / "s.npz"))
    assert (shard.xs[0].shape, shard.xs[0].dtype, shard.samples) == ((6, 3, 4), np.uint8, 6)
    assert (shard.y.tolist(), shard.shard_index) == ([0, 1, 2, 3, 0, 1], 2)
    assert load_shard(write_shard(tmp_path / "t.npz", shard_index=None)).shard_index == -1


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.float16, np.float64])
def test_samples_may_be_any_real_numbers(tmp_path, dtype):
    assert (
        load_shard(write_shard(tmp_path / "s.npz", x=np.ones((6, 2), dtype))).xs[0].dtype == dtype
    )


def deflated(path):
    np.savez_compressed(path, x=np.arange(60).reshape(6, 10), y=np.arange(6))
    return path


@pytest.mark.parametrize("write", [write_shard, deflated])
def test_a_shard_truncated_anywhere_is_refused(tmp_path, write):
    path = write(tmp_path / "s.npz")
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=r"s\.npz"):
            load_shard(path)


@pytest.mark.parametrize("write", [write_shard, deflated])
def test_a_shard_with_an_altered_byte_is_refused_or_reads_the_same_never_crashes(tmp_path, write):
    path = write(tmp_path / "s.npz")
    data, want = path.read_bytes(), load_shard(path)
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            got = load_shard(path)
        except ShardError:
            continue
        np.testing.assert_array_equal(got.xs[0], want.xs[0])
        np.testing.assert_array_equal(got.y, want.y)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": None}, "'x' is missing"),
        ({"y": None}, "'y' is missing"),
        ({"x": np.array([["a", "b"]] * 6)}, "numbers"),
        ({"x": np.ones((6, 2), complex)}, "numbers"),
        ({"y": np.ones(6)}, "integers"),
        ({"y": np.ones((6, 1), int)}, "length"),
        ({"y": np.ones(5, int)}, "length"),
        ({"x": np.ones((0, 2)), "y": np.ones(0, int)}, "length"),
        ({"x": np.full((6, 2), np.nan)}, "finite"),
        ({"x": np.full((6, 2), np.inf, np.float32)}, "finite"),
        ({"x": np.array([{}] * 6, dtype=object)}, "pickle"),
        ({"y": np.array([{}] * 6, dtype=object)}, "pickle"),
        ({"x": np.float32(1.0)}, "length"),
        ({"y": np.int64(1)}, "length"),
        ({"shard_index": np.arange(3)}, "shard_index|scalar"),
        ({"shard_index": "first"}, "shard_index|int"),
        ({"shard_index": -2}, "shard_index"),
    ],
    ids=str,
)
def test_a_shard_of_other_content_is_refused_in_one_line(tmp_path, arrays, says):
    path = write_shard(tmp_path / "s.npz", **arrays)
    with pytest.raises(ShardError, match=says) as caught:
        load_shard(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    path = write_shard(tmp_path / "s.npz", x=np.array([Bomb()] * 6, dtype=object))
    with pytest.raises(ShardError, match="pickle"):
        load_shard(path)


def test_what_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x.npy", "not an array")
        archive.writestr("y.npy", "not an array")
    for name in ("array.npy", "text.npz", "other.npz", "missing.npz", "."):
        with pytest.raises(ShardError):
            load_shard(tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "labels", "says"),
    [
        ((13,), [0, 3], "shape"),
        ((4, 3, 2), [0, 3], "shape"),
        ((12,), [0, 4], "label 4 is outside 0..3"),
        ((12,), [-1, 3], "label -1 is outside 0..3"),
    ],
)
def test_shard_that_does_not_fit_the_model_is_refused(client, tmp_path, shape, labels, says):
    manifest = parse_manifest((client / "manifest.json").read_bytes(), "manifest")
    shard = Shard(tmp_path / "s.npz", [np.ones((2, *shape))], np.array(labels), 0)
    with pytest.raises(ShardError, match=says):
        check_shard(shard, manifest)


def test_shard_whose_shape_differs_in_dimensions_of_one_fits(client, tmp_path):
    manifest = parse_manifest((client / "manifest.json").read_bytes(), "manifest")
    for shape in ((12,), (1, 12), (12, 1)):
        check_shard(Shard(tmp_path, [np.ones((2, *shape))], np.array([0, 3]), 0), manifest)


def test_every_file_error_is_an_input_error():
    assert all(issubclass(error, InputError) for error in (ShardError, BundleError, StateError))


def test_the_peak_of_memory_is_the_programs_own_and_not_that_of_who_started_it():
    """ru_maxrss would start at what this process holds."""
    code = "from edge_client.memory import memory_bytes; print(*memory_bytes())"
    ballast = np.ones(400 << 20, np.uint8)
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    now, peak = map(int, said.stdout.split())
    assert now <= peak < ballast.nbytes // 2
