import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.dataset import DatasetSplit
from pipeline.data.splits import open_splits
from pipeline.params.sources import DataParams, SplitParams
from pipeline.run.errors import InputError

CLASSES = ["a", "b", "c"]


def write(path, count=60):
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 4)).astype(np.uint8)
    np.savez(path, images=images, labels=(np.arange(count) % 3).astype(np.uint8))


def opened(folder, seed=0, indices=None, **splits):
    defaults = {
        "train": SplitParams(path="a.npz", rows=(0, 40)),
        "val": SplitParams(path="a.npz", rows=(40, 50)),
        "test": SplitParams(path="a.npz", rows=(50, 60)),
    }
    params = DataParams(**{**defaults, **splits})
    files = {}
    for name in ("train", "val", "test"):
        split = getattr(params, name)
        if split.path:
            files[f"data.{name}"] = folder / split.path
        if split.indices:
            files[f"data.{name}.indices"] = folder / split.indices
    return open_splits(params, files, CLASSES, seed)


@given(st.floats(0.05, 0.6), st.integers(0, 5))
def test_a_fraction_takes_its_share_of_every_class(tmp_path_factory, fraction, seed):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "a.npz")
    splits = opened(
        folder,
        seed,
        train=SplitParams(path="a.npz", rows=(0, 50)),
        val=SplitParams(fraction=fraction),
    )
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
    val = SplitParams(fraction=0.3)
    rows = [opened(tmp_path, seed, val=val)["val"].rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_rows_may_be_listed_in_a_file(tmp_path):
    write(tmp_path / "a.npz")
    (tmp_path / "val.txt").write_text("45 41\n49\n")
    np.save(tmp_path / "test.npy", np.array([59, 51], np.uint32))
    splits = opened(
        tmp_path,
        val=SplitParams(path="a.npz", indices="val.txt"),
        test=SplitParams(path="a.npz", indices="test.npy"),
    )
    assert splits["val"].rows.tolist() == [41, 45, 49]
    assert splits["test"].rows.tolist() == [51, 59]
    assert splits["test"].labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 x", r"data\.val\.indices: val\.txt is no list of rows"),
        ("3 60", r"names row 60; there are rows 0 to 59"),
        ("-1 4", r"names row -1; there are rows"),
        ("41 42 41", r"names row 41 twice"),
        ("39 41", r"data\.train and data\.val share 1 rows of a\.npz, the first is 39"),
        ("", r"data\.val has no patches"),
    ],
)
def test_a_list_of_rows_that_cannot_be_right_is_refused(tmp_path, text, words):
    write(tmp_path / "a.npz")
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        opened(tmp_path, val=SplitParams(path="a.npz", indices="val.txt"))


def test_a_list_of_another_kind_is_refused(tmp_path):
    write(tmp_path / "a.npz")
    np.save(tmp_path / "val.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match="must be a list of whole numbers"):
        opened(tmp_path, val=SplitParams(path="a.npz", indices="val.npy"))


def test_rows_of_two_files_never_overlap(tmp_path):
    write(tmp_path / "a.npz")
    write(tmp_path / "b.npz")
    splits = opened(tmp_path, test=SplitParams(path="b.npz", rows=(0, 10)))
    assert len(splits["test"]) == 10


def test_unlabeled_patches_can_be_opened_but_not_split(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((60, 2, 2, 4)))
    with pytest.raises(InputError, match=r"data\.train: a\.npz has no labels; name their array"):
        opened(tmp_path)


def test_rows_can_be_left_out(tmp_path):
    write(tmp_path / "a.npz")
    split = opened(tmp_path)["val"]
    assert split.without(np.array([41, 48])).rows.tolist() == [40, 42, 43, 44, 45, 46, 47, 49]


def test_what_is_stored_is_mapped_and_not_read(tmp_path):
    for name, array in {
        "images": np.zeros((3, 2, 2, 1), np.uint8),
        "labels": np.arange(3),
        "rows": np.arange(3),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    split = DatasetSplit.load(tmp_path)
    assert isinstance(split.images, np.memmap)
    assert split.labels.tolist() == [0, 1, 2]
