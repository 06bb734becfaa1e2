"""Folders of images by class: layout, classes, split, and everything that is no such folder."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from server_node.config import DataSection
from server_node.datasets import load_dataset
from server_node.errors import DataError


def picture(seed, shape=(6, 5)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make(folder, classes=("cat", "dog"), count=5, shape=(6, 5)):
    for number, name in enumerate(classes):
        for index in range(count):
            save(folder / name / f"{index}.png", picture(100 * number + index, shape))
    return folder


def load(folder):
    return load_dataset(DataSection(source=str(folder)))


def refusal(folder):
    with pytest.raises(DataError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_train_and_test_folders_are_the_split_and_classes_are_sorted(tmp_path):
    make(tmp_path / "train", ("dog", "ant"), 3)
    make(tmp_path / "test", ("dog",), 2)
    data = load(tmp_path)
    assert data.class_names == ("ant", "dog")
    assert (data.y_train.tolist(), data.y_test.tolist()) == ([0, 0, 0, 1, 1, 1], [1, 1])
    assert data.x_train[0].dtype == np.uint8
    np.testing.assert_array_equal(data.x_train[0][3], picture(0))
    np.testing.assert_array_equal(data.x_test[0][1], picture(1))


@pytest.mark.parametrize("suffix", ["png", "bmp", "pgm", "PNG"])
def test_grey_images_are_height_by_width_in_every_lossless_format(tmp_path, suffix):
    for name in "ab":
        for index in range(2):
            save(tmp_path / name / f"{index}.{suffix}", picture(7))
    np.testing.assert_array_equal(load(tmp_path).x_train[0][0], picture(7))


def test_colour_images_have_their_channels_first_without_a_flag(tmp_path):
    make(tmp_path / "train", shape=(6, 5, 3))
    make(tmp_path / "test", shape=(6, 5, 3))
    x = load(tmp_path).x_train[0]
    assert x.shape == (10, 3, 6, 5)
    np.testing.assert_array_equal(x[0].transpose(1, 2, 0), picture(0, (6, 5, 3)))


def test_jpeg_is_read(tmp_path):
    for name in "ab":
        for index in range(2):
            save(tmp_path / name / f"{index}.jpeg", np.full((8, 8), 200, np.uint8))
    assert abs(int(load(tmp_path).x_train[0].mean()) - 200) <= 2


def test_without_train_and_test_a_fifth_of_each_class_is_the_test_set_always_the_same(tmp_path):
    make(tmp_path, count=10)
    data, again = load(tmp_path), load(tmp_path)
    assert np.bincount(data.y_train).tolist() == [8, 8]
    assert np.bincount(data.y_test).tolist() == [2, 2]
    both = np.concatenate([data.x_train[0], data.x_test[0]])
    assert len({image.tobytes() for image in both}) == 20
    np.testing.assert_array_equal(data.x_test[0], again.x_test[0])
    assert "16 training and 4 test images, 5x6 grey, 2 classes" in data.notes[0]


def test_a_class_may_be_called_train(tmp_path):
    assert load(make(tmp_path, ("train", "bus", "test"))).class_names == ("bus", "test", "train")


def test_hidden_files_and_files_beside_the_classes_are_passed_over(tmp_path):
    make(tmp_path)
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "cat" / ".DS_Store").write_text("x")
    (tmp_path / ".git").mkdir()
    assert load(tmp_path).class_names == ("cat", "dog")


def test_a_folder_beside_train_and_test_is_said_not_to_be_read(tmp_path):
    for split in ("train", "test", "val"):
        make(tmp_path / split)
    assert "not read: val" in load(tmp_path).notes[0]


def write_bomb(path):
    """A PNG that claims 60,000 x 60,000 pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def save_as_tiff(path):
    Image.fromarray(picture(0)).save(path, "TIFF")


def save_deep(path):
    Image.fromarray(np.ones((6, 5), np.uint16)).save(path)


# What is done to a path below the folder, and what the error says beside that path.
FAULTS = {
    "text": ("cat/notes.txt", lambda path: path.write_text("x"), "remove"),
    "no image": ("cat/1.png", lambda path: path.write_text("x"), "not a readable image"),
    "truncated": ("cat/1.png", truncate, "not a readable image"),
    "size": (
        "cat/3.png",
        lambda p: save(p, picture(0, (6, 7))),
        "7x6 grey, the first image is 5x6",
    ),
    "mode": ("dog/0.png", lambda p: save(p, picture(0, (6, 5, 3))), "5x6 RGB, the first image is"),
    "alpha": ("cat/0.png", lambda path: save(path, picture(0, (6, 5, 4))), "RGBA; convert"),
    "16 bit": ("cat/0.png", save_deep, "I;16; convert"),
    "another format": ("cat/0.png", save_as_tiff, "not a readable image"),
    "empty class": ("eel", lambda path: path.mkdir(), "without images"),
    "nested": ("cat/more", lambda path: path.mkdir(), "inside a class"),
    "outside": ("stray.png", lambda path: save(path, picture(0)), "outside a class"),
    "one image": ("eel", lambda path: save(path / "0.png", picture(0)), "one image"),
    "loop": ("loop", lambda path: path.symlink_to(path.parent), "inside a class"),
    "broken link": ("cat/7.png", lambda path: path.symlink_to("missing"), "not an image file"),
    "link to itself": ("cat/7.png", lambda path: path.symlink_to(path), "not an image file"),
    "pipe": ("cat/7.png", os.mkfifo, "not an image file"),
    "bomb": ("cat/0.png", write_bomb, "decompression bomb"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_belong_is_refused_by_name_in_one_line(tmp_path, fault):
    name, spoil, says = FAULTS[fault]
    spoil(make(tmp_path / "photos") / name)
    text = refusal(tmp_path / "photos")
    assert str(tmp_path / "photos" / name) in text
    assert says in text


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    assert "IDX" in refusal(tmp_path)
    make(tmp_path, ("cat",))
    assert "one class alone" in refusal(tmp_path)


def test_train_without_test_and_a_class_that_is_not_trained_are_refused(tmp_path):
    make(tmp_path / "train")
    assert f"{tmp_path / 'test'}: no such folder" in refusal(tmp_path)
    make(tmp_path / "test", ("cat", "eel"))
    assert "test/eel has no train/eel" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "PPM"])
def test_truncated_images_are_refused_or_read_the_same_at_every_length(tmp_path, kind):
    folder = make(tmp_path / "photos", count=2)
    path = folder / "cat" / "0.png"
    Image.fromarray(picture(0)).save(path, kind)
    data, want = path.read_bytes(), load(folder)
    for size in range(0, len(data), 17 if kind in ("JPEG", "BMP") else 1):
        path.write_bytes(data[:size])
        if size < len(data) // 2:
            assert "0.png" in refusal(folder)
        elif (got := unless_refused(folder)) is not None:  # without a checksum, or the end's mark
            assert all(np.array_equal(a, b) for a, b in zip(got[1:5], want[1:5], strict=True))


def unless_refused(folder):
    try:
        return load(folder)
    except DataError:
        return None
