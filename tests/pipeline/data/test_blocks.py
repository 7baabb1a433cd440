"""The one reader of the user's patches, and the files that are written beside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.array_file import ArrayFile
from pipeline.data.blocks import BlockReader, bands_by_modality
from pipeline.data.source import PatchSource, pick_bands
from pipeline.data.splits import Split
from pipeline.data.survey import hash_patches
from preprocessing.contract import Channels, Scaling

SCALING = Scaling("linear", (0.0, 1.0), (0.0, 1.0))


def split_of(arrays, rows=None):
    """A split over arrays by modality, read by row and band."""
    first = next(iter(arrays.values()))
    source = PatchSource(
        path=None,
        count=len(first),
        shapes={m: a.shape[1:] for m, a in arrays.items()},
        labels=None,
        reader=lambda modality, rows, bands: pick_bands(arrays[modality][rows], bands),
    )
    return Split("train", source, np.arange(len(first)) if rows is None else rows)


def read_all(reader):
    """Rows and patches of every block; blocks hold good only for a while, so they are copied."""
    return [
        (block.rows, {m: patches.copy() for m, patches in block.patches.items()})
        for block in reader
    ]


@given(
    count=st.integers(1, 200),
    bad=st.sets(st.integers(0, 199)),
    block=st.integers(1, 90),
    kind=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_blocks_are_full_of_good_patches_whatever_was_bad_between(count, bad, block, kind):
    random = np.random.default_rng(count)
    arrays = {
        "optical": random.normal(size=(count, 2, 3, 4)),
        "sar": random.normal(size=(count, 2, 3, 2)),
    }
    bad = sorted(row for row in bad if row < count)
    for row in bad:
        arrays["sar" if row % 2 else "optical"][row, 1, 2, 1] = kind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.blocks.BLOCK", block)
        patch.setattr("pipeline.data.blocks.PIECE", 7)
        reader = BlockReader(split_of(arrays), {"optical": (1, 3), "sar": (1,)})
        blocks = read_all(reader)
    good = np.setdiff1d(np.arange(count), bad)
    assert reader.bad.tolist() == bad
    assert [len(rows) for rows, _ in blocks[:-1]] == [min(block, count)] * (len(blocks) - 1)
    if not len(good):
        assert blocks == []
        return
    assert np.array_equal(np.concatenate([rows for rows, _ in blocks]), good)
    patches = np.concatenate([some["optical"] for _, some in blocks])
    assert patches.dtype == np.float32
    assert np.array_equal(patches, arrays["optical"][good][..., [1, 3]].astype(np.float32))
    low, high = reader.extremes("optical")  # of the stored values, not of their float32
    assert np.array_equal(low, arrays["optical"][good][..., [1, 3]].min(axis=(0, 1, 2)))
    assert np.array_equal(high, arrays["optical"][good][..., [1, 3]].max(axis=(0, 1, 2)))


def test_a_bad_value_in_a_band_that_nobody_sees_is_none():
    array = np.zeros((3, 2, 2, 2))
    array[1, ..., 0] = np.nan
    reader = BlockReader(split_of({"optical": array}), {"optical": (1,)})
    assert [rows.tolist() for rows, _ in read_all(reader)] == [[0, 1, 2]]
    assert reader.bad.tolist() == []


def test_a_viewer_gets_its_bands_in_its_order():
    array = np.arange(2 * 5).reshape(2, 1, 1, 5)
    viewers = [
        Channels("optical", (4, 2), SCALING, None),
        Channels("optical", (1, 2), SCALING, None),
    ]
    bands = bands_by_modality(viewers)
    assert bands == {"optical": (1, 2, 4)}
    (block,) = BlockReader(split_of({"optical": array}), bands)
    assert block.select(viewers[0]).reshape(2, -1).tolist() == [[4, 2], [9, 7]]
    assert block.select(viewers[1]).reshape(2, -1).tolist() == [[1, 2], [6, 7]]


@given(bands=st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_bands_are_picked_like_a_list_of_indices(bands):
    patches = np.arange(2 * 3 * 6).reshape(2, 3, 1, 6)
    assert np.array_equal(pick_bands(patches, bands), patches[..., bands])


def test_only_equal_patches_have_equal_hashes():
    random = np.random.default_rng(0)
    patches = random.integers(0, 4, (3000, 2, 2, 3)).astype(np.float32)  # some are equal by chance
    patches[0], patches[1] = np.eye(2, 6).reshape(2, 2, 3)[None], 0.0
    hashes = hash_patches([patches[..., :2], patches[..., 2:]])
    assert len(np.unique(hashes)) == len(np.unique(patches.reshape(3000, -1), axis=0))
    assert np.array_equal(hashes, hash_patches([patches[..., :2], patches[..., 2:]]))


@given(
    reserved=st.integers(0, 2000),
    share=st.floats(0, 1),
    shape=st.lists(st.integers(1, 3), max_size=3).map(tuple),
    dtype=st.sampled_from([np.uint8, np.float32, np.int64]),
)
def test_an_array_file_is_numpys_own_and_may_end_early(
    tmp_path_factory, reserved, share, shape, dtype
):
    path = tmp_path_factory.mktemp("array") / "a.npy"
    array = np.random.default_rng(0).integers(0, 99, (int(share * reserved), *shape)).astype(dtype)
    with ArrayFile(path, dtype, reserved, shape) as file:
        for start in range(0, len(array), 700):
            file.append(array[start : start + 700])
    assert np.array_equal(np.load(path), array)
    assert np.load(path, mmap_mode="r").shape == array.shape if len(array) else True
    if len(array) == reserved:
        np.save(path.with_name("b.npy"), array)
        assert path.read_bytes() == path.with_name("b.npy").read_bytes()
