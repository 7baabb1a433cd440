import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.data.formats.so2sat_h5 import open_so2sat
from pipeline.data.synthetic import write_so2sat

KDPIPE = Path(sys.executable).parent / "kdpipe"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    write_so2sat(folder / "train.h5", 1020, seed=1)
    write_so2sat(folder / "test.h5", 340, seed=2)
    return folder


def test_the_form_is_that_of_so2sat(files):
    with h5py.File(files / "train.h5") as file:
        assert {name: (d.shape, d.dtype.name) for name, d in file.items()} == {
            "sen1": ((1020, 32, 32, 8), "float64"),
            "sen2": ((1020, 32, 32, 10), "float64"),
            "label": ((1020, 17), "float64"),
        }
        assert (file["label"][:].sum(axis=0) == 60).all()
        optical = file["sen2"][:]
        assert optical.min() > 0
        assert optical.max() <= 2.8
        # Close to the published statistics of So2Sat: blue 0.124 +- 0.040 reflectance.
        assert optical[..., 0].mean() == pytest.approx(0.124, abs=0.02)
        assert optical[..., 0].std() == pytest.approx(0.040, abs=0.015)


def test_it_says_that_it_is_synthetic(files):
    source = open_so2sat(files / "train.h5", {"optical": "sen2"}, "label")
    assert source.synthetic == "kdpipe synth so2sat --patches 1020 --seed 1"


def test_the_seed_gives_the_file(files, tmp_path):
    write_so2sat(tmp_path / "same.h5", 340, seed=2)
    write_so2sat(tmp_path / "other.h5", 340, seed=3)
    with (
        h5py.File(files / "test.h5") as one,
        h5py.File(tmp_path / "same.h5") as same,
        h5py.File(tmp_path / "other.h5") as other,
    ):
        assert np.array_equal(one["sen2"][:], same["sen2"][:])
        assert not np.array_equal(one["sen1"][:], other["sen1"][:])


@pytest.mark.parametrize(("key", "bar"), [("sen2", 0.3), ("sen1", 0.15)])
def test_classes_can_be_told_apart_in_other_cities_by_either_sensor(files, key, bar):
    """Nearest class mean of simple features: far above chance (0.06), far from perfect."""

    def features(name):
        with h5py.File(files / name) as file:
            patches = file[key][:]
            labels = file["label"][:].argmax(axis=1)
        parts = [patches.mean(axis=(1, 2)), patches.std(axis=(1, 2))]
        return np.concatenate(parts, axis=1), labels

    train, train_labels = features("train.h5")
    test, test_labels = features("test.h5")
    scale = train.std(axis=0)
    centers = np.stack([train[train_labels == c].mean(axis=0) for c in range(17)])
    distances = (((test[:, None] - centers) / scale) ** 2).sum(axis=2)
    accuracy = (distances.argmin(axis=1) == test_labels).mean()
    assert bar < accuracy < 0.95, accuracy


def test_the_command_writes_a_file_and_never_over_one(tmp_path):
    command = [KDPIPE, "synth", "so2sat", "x.h5", "--patches", "20", "--seed", "4"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "wrote x.h5: 20 synthetic patches, seed 4\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, "x.h5 exists" in again.stderr) == (3, True)
    command[3] = "nowhere/x.h5"
    lost = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (lost.returncode, "can't write nowhere/x.h5" in lost.stderr) == (3, True)
    assert "Traceback" not in lost.stderr
