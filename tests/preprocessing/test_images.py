import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.images import class_folders, read_png, write_in_order, write_png


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    write_png(image, tmp_path / "x.png")
    assert np.array_equal(read_png(tmp_path / "x.png"), image)


def test_sorted_by_name_images_are_in_the_order_given(tmp_path):
    images = [np.full((1, 1, 3), i, np.uint8) for i in range(12)]
    write_in_order(images, tmp_path / "flat", len(images))
    files = sorted((tmp_path / "flat").iterdir())
    assert [int(read_png(file)[0, 0, 0]) for file in files] == list(range(12))


@given(st.lists(st.text(max_size=8), min_size=1, max_size=130))
def test_the_alphabetical_order_of_class_folders_is_the_order_of_classes(labels):
    folders = class_folders(labels)
    assert sorted(folders) == folders
    assert len(set(folders)) == len(labels)
    assert all(name.isascii() and "/" not in name for name in folders)
