"""Labels of other forms, files that lie about their size, and `musplit shard` as a run does it."""

import gzip
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.datasets import load_digits

from edge_client.errors import ShardError
from edge_client.shard import load_shard
from emulation.inprocess import make_shards
from musplit.cli import main
from server_node.config import DataSection, load_config
from server_node.datasets import load_dataset
from server_node.errors import ConfigError, DataError
from server_node.samples import Draw, seeded_order


def refusal(source):
    with pytest.raises(DataError) as caught:
        load_dataset(DataSection(source=str(source)))
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    return str(caught.value)


def write(path, **changes):
    y = np.arange(6) % 3
    arrays = {"x_train": np.ones((6, 4), np.uint8), "y_train": y,
              "x_test": np.ones((6, 4), np.uint8), "y_test": y, **changes}  # fmt: skip
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("y", "remedy"),
    [
        (np.zeros((6, 1), int), "store y.ravel()"),
        (np.eye(6)[:, :3], "store y.argmax(axis=1)"),
        (np.zeros(6), "store y.astype(np.int64)"),
        (np.zeros(6, bool), "store y.astype(np.int64)"),
    ],
)
def test_labels_of_another_form_are_refused_with_the_remedy(tmp_path, y, remedy):
    text = refusal(write(tmp_path / "d.npz", y_test=y))
    assert "y_test" in text
    assert text.endswith(remedy)


def test_digits_are_those_that_scikit_learn_loads():
    """All of them, as they are; which of them are test samples is drawn from a fixed seed."""
    data = load_dataset(DataSection())
    x, y = load_digits(return_X_y=True)
    rows = np.concatenate((np.column_stack((data.x_test[0], data.y_test)),
                           np.column_stack((data.x_train[0], data.y_train))))  # fmt: skip
    order = seeded_order(Draw.DIGITS, len(y))
    np.testing.assert_array_equal(rows, np.column_stack((x, y))[order])
    assert (len(data.y_test), data.x_train[0].dtype) == (359, np.uint8)


def test_names_of_classes_in_an_npz_are_taken(tmp_path):
    path = write(tmp_path / "d.npz", classes=np.array(["ant", "bee", "cat"]))
    assert load_dataset(DataSection(source=str(path))).class_names == ("ant", "bee", "cat")


def test_an_npz_of_other_names_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "d.npz", train_images=np.ones(3))
    assert "'x_train' is missing; the file holds 'train_images'" in refusal(tmp_path / "d.npz")


@pytest.mark.parametrize("x", [np.full((6, 4), 1e39), np.ones((6, 0))])
def test_samples_beyond_float32_or_without_elements_are_refused(tmp_path, x):
    assert "x_train" in refusal(write(tmp_path / "d.npz", x_train=x))


def lie(path, shape):
    """An npz whose x_train promises `shape` and holds four bytes."""
    write(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    for name in ("x_train.npy", "x.npy"):
        members[name] = head.getvalue() + b"1234"
    members["y.npy"] = members["y_train.npy"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("shape", [(1 << 32, 1), (1 << 62,), (1 << 40, 1 << 40)])
def test_an_npz_that_promises_more_than_it_holds_is_refused(tmp_path, shape):
    path = lie(tmp_path / "d.npz", shape)
    assert "not a readable npz" in refusal(path)
    with pytest.raises(ShardError, match="not a readable npz"):
        load_shard(path)


def test_idx_that_unpacks_to_more_than_its_header_says_is_cut_off(tmp_path):
    for split in ("train", "t10k"):
        images = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 4, 4) + bytes(32 << 20)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
    tracemalloc.start()
    try:
        assert "more than 32 values" in refusal(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_source_lists_the_sources(tmp_path):
    for source in ("mnist", tmp_path / "x.csv.gz", tmp_path / "missing"):
        text = refusal(source)
        assert "no such file or folder" in text
        assert all(word in text for word in ("'digits'", ".npz", "IDX", "images", ".csv"))


def shard(*arguments):
    return CliRunner().invoke(main, ["shard", *map(str, arguments)])


@pytest.fixture
def walks(tmp_path):
    rows = "".join(f"{n},{-n},{'run' if n % 40 < 20 else 'sit'},{n // 60}\n" for n in range(600))
    path = tmp_path / "walks.csv"
    path.write_text(f"a,b,kind,rec\n{rows}")
    config = tmp_path / "lab.toml"
    config.write_text(
        f'[run]\nseed = 5\n[devices]\ncount = 3\n[data]\nsource = "{path}"\nalpha = 0.5\n'
        'window = 5\nstride = 4\nlabel = "kind"\ngroup = "rec"\nholdout = 0.1\n'
    )
    return config


def test_shards_of_a_configuration_are_those_of_its_run(tmp_path, walks):
    result = shard(walks, "--out", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    paths = sorted((tmp_path / "shards").iterdir())
    assert [str(path) for path in paths] == result.stdout.split()
    for path, want in zip(paths, make_shards(load_config(walks, [])), strict=True):
        got = load_shard(path)
        np.testing.assert_array_equal(got.xs[0], want.xs[0])
        np.testing.assert_array_equal(got.y, want.y)
    assert "data: " in result.stderr
    assert "held out" in result.stderr


def test_options_and_set_of_shard_say_the_same_as_a_configuration(tmp_path, walks):
    shard(walks, "--out", tmp_path / "one")
    result = shard(
        tmp_path / "walks.csv", "--devices", 3, "--alpha", 0.5, "--seed", 5, "--holdout", 0.1,
        "--set", "data.window=5", "--set", "data.stride=4", "--set", "data.label=kind",
        "--set", "data.group=rec", "--out", tmp_path / "two",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for index in range(3):
        one, two = (load_shard(tmp_path / out / f"shard-{index:03d}.npz") for out in ("one", "two"))
        np.testing.assert_array_equal(one.xs[0], two.xs[0])
        np.testing.assert_array_equal(one.y, two.y)


def test_options_win_over_the_configuration(tmp_path, walks):
    result = shard(walks, "--devices", 2, "--alpha", 0, "--out", tmp_path / "shards")
    assert len(result.stdout.split()) == 2


def test_shard_without_a_number_of_devices_and_with_unknown_fields_is_refused(tmp_path):
    assert "--devices" in shard("digits", "--out", tmp_path).stderr
    with pytest.raises(ConfigError, match=r"--set: data: .*windo"):
        load_config(None, ["data.windo=3"])


def test_images_become_shards_that_boards_read(tmp_path):
    for number in range(8):
        folder = tmp_path / "photos" / ("even" if number % 2 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), number, np.uint8)).save(folder / f"{number}.png")
    result = shard(tmp_path / "photos", "--devices", 2, "--out", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    assert load_shard(tmp_path / "shards" / "shard-000.npz").xs[0].shape == (3, 3, 4, 6)
    assert "6 training and 2 test images, 6x4 RGB, 2 classes" in result.stderr
