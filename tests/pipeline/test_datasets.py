import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets import (
    DatasetSplit,
    NpzSource,
    band_statistics,
    class_histogram,
    open_splits,
)
from pipeline.sources import DataParams, SplitParams
from pipeline.stage import InputError


def write(path, count=60, classes=3):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 2, 2, 4)).astype(np.uint8)
    np.savez(path, images=images, labels=(np.arange(count) % classes).astype(np.uint8))
    return images


def params(**splits):
    return DataParams(**{"train": SplitParams(path="a.npz"), **splits})


def test_a_source_gives_what_the_file_holds(tmp_path):
    images = write(tmp_path / "a.npz")
    source = NpzSource(tmp_path / "a.npz", {"optical": "images"}, "labels")
    assert len(source) == 60
    assert source.shape("optical") == (2, 2, 4)
    rows = np.array([5, 3, 59])
    assert np.array_equal(source.read("optical", rows), images[rows])
    assert source.labels.dtype == np.int64


@given(st.floats(0.05, 0.6), st.integers(0, 5))
def test_a_fraction_takes_its_share_of_every_class(tmp_path_factory, fraction, seed):
    path = tmp_path_factory.mktemp("data") / "a.npz"
    write(path)
    splits = open_splits(
        params(val=SplitParams(fraction=fraction), test=SplitParams(path="a.npz", rows=(50, 60)),
               train=SplitParams(path="a.npz", rows=(0, 50))),
        {"train": path, "test": path},
        classes=3,
        seed=seed,
    )  # fmt: skip
    val, train = splits["val"], splits["train"]
    assert len(val) + len(train) == 50
    assert np.intersect1d(val.rows, train.rows).size == 0
    for label in range(3):
        members = (np.arange(50) % 3 == label).sum()
        assert abs((val.labels == label).sum() - fraction * members) <= 1
    assert (np.diff(val.rows) > 0).all()
    assert (np.diff(train.rows) > 0).all()


def test_the_seed_decides_the_fraction(tmp_path):
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    files = {"train": tmp_path / "a.npz", "test": tmp_path / "b.npz"}
    given_ = params(val=SplitParams(fraction=0.3), test=SplitParams(path="b.npz"))
    rows = [open_splits(given_, files, 3, seed)["val"].rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_what_is_stored_is_mapped_and_not_read(tmp_path):
    (tmp_path / "val").mkdir()
    for name, array in (("images", np.zeros((3, 2, 2, 1), np.uint8)), ("labels", np.arange(3)),
                        ("rows", np.arange(3))):  # fmt: skip
        np.save(tmp_path / "val" / f"{name}.npy", array)
    split = DatasetSplit.load(tmp_path, "val")
    assert isinstance(split.images, np.memmap)
    assert split.labels.tolist() == [0, 1, 2]


def test_a_histogram_counts_absent_classes_too():
    assert class_histogram(np.array([0, 2, 2]), 4) == [1, 0, 2, 0]


def test_statistics_from_running_sums():
    values = np.random.default_rng(0).normal(5, 2, (1000, 3))
    mean, sigma = band_statistics(values.sum(axis=0), np.square(values).sum(axis=0), len(values))
    assert mean == pytest.approx(values.mean(axis=0))
    assert sigma == pytest.approx(values.std(axis=0))


def test_an_empty_split_is_refused(tmp_path):
    write(tmp_path / "a.npz", count=6)
    with pytest.raises(InputError, match=r"data\.val has no patches|give \[first"):
        open_splits(
            params(val=SplitParams(path="a.npz", rows=(3, 3)), test=SplitParams(path="a.npz")),
            {"train": tmp_path / "a.npz", "val": tmp_path / "a.npz", "test": tmp_path / "a.npz"},
            3,
            0,
        )
