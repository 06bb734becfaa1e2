"""Data sets, their standardisation, hold-out and partition into shards."""

import gzip
import struct

import numpy as np
import pytest

from edge_client.shard import load_shard
from server_node.config import DataSection
from server_node.datasets import load_dataset
from server_node.errors import DataError
from server_node.partition import partition, write_shards
from server_node.transform import declare
from wire_protocol.manifest import InputSpec, prepare_input

LABELS = np.repeat(np.arange(10), 30)


def load(source, holdout=0.0):
    return load_dataset(DataSection(source=str(source), holdout=holdout))


def refusal(source, holdout=0.0):
    with pytest.raises(DataError) as caught:
        load(source, holdout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_split_the_same_way_always():
    one, other = load("digits"), load("digits")
    assert (len(one.y_train), len(one.y_test)) == (1438, 359)
    assert one.x_train[0].shape == (1438, 64)
    assert all(np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
    assert set(one.y_test.tolist()) == set(range(10))


# -- npz


def write_npz(path, save=np.savez, **arrays):
    data = {
        "x_train": np.arange(60, dtype=np.uint8).reshape(10, 6), "y_train": np.arange(10) % 3,
        "x_test": np.ones((4, 6), np.uint8), "y_test": np.arange(4) % 3, **arrays,
    }  # fmt: skip
    save(path, **{name: array for name, array in data.items() if array is not None})
    return path


def test_npz_is_read_as_it_is(tmp_path):
    data = load(write_npz(tmp_path / "d.npz"))
    np.testing.assert_array_equal(data.x_train[0], np.arange(60).reshape(10, 6))
    assert (data.x_train[0].dtype, data.y_train.dtype) == (np.uint8, np.int64)
    assert data.y_test.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x_train": None}, "x_train"),
        ({"y_test": None}, "y_test"),
        ({"y_train": np.arange(9)}, "y_train"),
        ({"y_train": np.ones(10)}, "y_train"),
        ({"y_train": np.ones((10, 1), int)}, "y_train"),
        ({"y_train": np.arange(10) - 1}, "-1"),
        ({"x_train": np.full((10, 6), np.nan)}, "x_train"),
        ({"x_test": np.full((4, 6), np.inf)}, "x_test"),
        ({"x_test": np.ones((4, 7))}, "shape"),
        ({"x_test": np.ones((0, 6)), "y_test": np.ones(0, int)}, "x_test"),
        ({"x_train": np.array([["a"] * 6] * 10)}, "x_train"),
        ({"x_train": np.array([{}] * 10, dtype=object)}, "pickle"),
        ({"x_train": np.float32(1.0)}, "x_train"),
    ],
    ids=str,
)
def test_npz_of_other_content_is_refused_in_one_line(tmp_path, arrays, says):
    path = write_npz(tmp_path / "d.npz", **arrays)
    text = refusal(path)
    assert says in text
    assert str(path) in text


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_npz_is_refused(tmp_path, save):
    path = write_npz(tmp_path / "d.npz", save)
    data = path.read_bytes()
    for size in range(0, len(data), 11):
        path.write_bytes(data[:size])
        assert "d.npz" in refusal(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_an_altered_byte_is_refused_or_reads_the_same_never_crashes(tmp_path, save):
    path = write_npz(tmp_path / "d.npz", save)
    data, want = path.read_bytes(), load(path)
    for position in range(0, len(data), 2):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            got = load(path)
        except DataError:
            continue
        assert all(np.array_equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


def test_npy_called_npz_and_names_that_are_nothing_are_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "array.npz" in refusal(tmp_path / "array.npz")
    assert "missing.npz" in refusal(tmp_path / "missing.npz")
    assert "use 'digits'" in refusal("mnist")
    assert "use 'digits'" in refusal(tmp_path / "missing-folder")


# -- IDX


def idx(array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx(folder, *, packed=False):
    folder.mkdir()
    for split, size in (("train", 6), ("t10k", 4)):
        images, labels = np.arange(size * 12).reshape(size, 3, 4), np.arange(size) % 3
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            data = idx(array)
            if packed:
                (folder / f"{split}-{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / f"{split}-{name}").write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folder_is_read_plain_and_packed(tmp_path, packed):
    data = load(write_idx(tmp_path / "idx", packed=packed))
    np.testing.assert_array_equal(data.x_train[0], np.arange(72).reshape(6, 3, 4))
    assert data.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.x_test[0].shape == (4, 3, 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_missing_or_truncated_idx_file_is_refused_by_name(tmp_path, name, packed):
    folder = write_idx(tmp_path / "idx", packed=packed)
    path = folder / (f"{name}.gz" if packed else name)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert name in refusal(folder)
    path.unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\x09\x01\0\0\0\x06abcdef",
        b"\0\x01\x08\x01\0\0\0\x06abcdef",
        b"\0\0\x08\x01\0\0\0\x07abcdef",
        b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xffabcdef",
        b"\0\0\x08\0a",
        b"\0\0\x08\xff" + b"\0\0\0\x01" * 255 + b"a",
        idx(np.arange(72).reshape(6, 3, 4)),
    ],
    ids=["type", "magic", "size", "absurd size", "no dimensions", "255 dimensions", "images"],
)
def test_idx_labels_that_are_no_labels_are_refused(tmp_path, data):
    folder = write_idx(tmp_path / "idx")
    (folder / "train-labels-idx1-ubyte").write_bytes(data)
    refusal(folder)


def test_idx_folder_that_says_gz_and_is_not_is_refused(tmp_path):
    folder = write_idx(tmp_path / "idx", packed=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    assert "train-images" in refusal(folder)


# -- standardisation


def fitted(x, how):
    return declare(DataSection(standardise=how), [x], ["float32"])[0].transform


def standardised(x, how):
    """Samples as the graph sees them."""
    transform = fitted(x, how)
    return prepare_input(
        x, InputSpec("input", list(x.shape[1:]), list(x.shape[1:]), "float32", transform)
    )


def test_none_leaves_samples_alone():
    x = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(standardised(x, "none"), x)


def test_global_gives_all_elements_together_mean_0_and_deviation_1():
    x = np.random.default_rng(0).integers(0, 256, (200, 3, 4), np.uint8)
    out = standardised(x, "global")
    assert abs(out.mean()) < 1e-4
    assert abs(out.std() - 1) < 1e-4
    assert out.shape == x.shape
    assert len(fitted(x, "global").mean) == 1


def test_feature_gives_each_element_mean_0_and_deviation_1():
    x = np.random.default_rng(0).normal([5, -3, 100], [2, 0.1, 30], (500, 3))
    out = standardised(x, "feature")
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 7.0, 0.1, 1 / 3, -1e6 / 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("how", ["global", "feature"])
def test_constant_feature_becomes_0_and_keeps_its_scale(constant, dtype, how):
    x = np.full((1000, 2), constant, dtype)
    assert set(fitted(x, how).std) == {1.0}
    np.testing.assert_allclose(standardised(x, how), 0, atol=1e-6)


# -- hold-out


@pytest.mark.parametrize("holdout", [0.1, 0.25, 0.9])
def test_holdout_splits_the_training_set_and_leaves_the_test_set_out(tmp_path, holdout):
    x = np.arange(200).reshape(100, 2)
    path = write_npz(tmp_path / "d.npz", x_train=x, y_train=np.arange(100),
                     x_test=np.full((4, 2), 999))  # fmt: skip
    data = load(path, holdout)
    assert len(data.y_test) == round(100 * holdout)
    assert sorted([*data.y_train, *data.y_test]) == list(range(100))
    np.testing.assert_array_equal(data.x_train[0], x[data.y_train])
    np.testing.assert_array_equal(data.x_test[0], x[data.y_test])
    again = load(path, holdout)
    np.testing.assert_array_equal(data.y_test, again.y_test)
    assert data.y_test.tolist() != sorted(data.y_test.tolist())


@pytest.mark.parametrize("holdout", [0.01, 0.99])
def test_holdout_that_leaves_one_side_empty_is_refused(tmp_path, holdout):
    assert "holdout" in refusal(write_npz(tmp_path / "d.npz"), holdout)


# -- partition


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("devices", [1, 3, 7])
def test_every_sample_is_in_exactly_one_shard_and_the_seed_says_which(alpha, devices):
    parts = partition(LABELS, devices, alpha, seed=1)
    assert len(parts) == devices
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))
    again = partition(LABELS, devices, alpha, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if devices > 1:
        other = partition(LABELS, devices, alpha, seed=2)
        assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_iid_shards_have_equal_sizes():
    sizes = [len(part) for part in partition(LABELS, 7, 0.0, seed=0)]
    assert max(sizes) - min(sizes) <= 1


def test_smaller_alpha_means_more_skew():
    def skew(alpha):
        """Mean share of a device's commonest label."""
        parts = partition(LABELS, 5, alpha, seed=0)
        return np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts])

    assert skew(0.05) > skew(1.0) > skew(1000.0)
    assert skew(1000.0) < 0.15


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_more_devices_than_samples_is_refused(alpha):
    assert len(partition(np.arange(4), 4, 0.0, seed=0)) == 4
    with pytest.raises(DataError, match="too few"):
        partition(np.arange(4), 5, alpha, seed=0)


@pytest.mark.parametrize("alpha", [1e-3, 1e-9, 1e-300])
def test_alpha_that_starves_a_device_is_refused(alpha):
    with pytest.raises(DataError, match="alpha"):
        partition(np.zeros(50, np.int64), 10, alpha, seed=0)


def test_every_device_gets_its_minimum():
    parts = partition(LABELS, 5, 0.3, seed=0, minimum=20)
    assert min(len(part) for part in parts) >= 20


def test_written_shards_are_what_boards_read(tmp_path):
    data = load(write_npz(tmp_path / "d.npz"))
    paths = write_shards(data, 3, 0.0, 0, tmp_path / "shards")
    assert [path.name for path in paths] == ["shard-000.npz", "shard-001.npz", "shard-002.npz"]
    shards = [load_shard(path) for path in paths]
    assert [shard.shard_index for shard in shards] == [0, 1, 2]
    rows = sorted(row.tobytes() for shard in shards for row in shard.xs[0])
    assert rows == sorted(row.tobytes() for row in data.x_train[0])
