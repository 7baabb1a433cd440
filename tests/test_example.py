"""The Landsat example is what its files say it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.splits import open_splits
from pipeline.run.config import load_config
from pipeline.stages import load_stages
from pipeline.teachers.open import open_teacher
from preprocessing.contract import load_contract

EXAMPLE = Path(__file__).parents[1] / "examples" / "landsat"


@pytest.fixture(scope="module")
def params():
    return load_config(EXAMPLE / "kdpipe.yaml", load_stages()).params["ingest"]


@pytest.fixture(scope="module")
def splits(params):
    files = {}
    for name, split in params.data.splits.items():
        files[f"data.{name}"] = EXAMPLE / split.path
        if split.indices:
            files[f"data.{name}.indices"] = EXAMPLE / split.indices
    return open_splits(params.data, files, ["a", "b", "c", "d", "e", "f"], seed=0)


def test_the_splits_are_the_published_ones(splits):
    assert splits["test"].rows.tolist() == list(range(4435, 6435))
    parts = [splits[name].rows for name in ("train", "unlabeled", "val")]
    assert [len(rows) for rows in parts] == [800, 2748, 887]
    assert sorted(np.concatenate(parts).tolist()) == list(range(4435))


def test_every_split_has_every_class_in_its_share(splits):
    source = splits["train"].source
    whole = np.bincount(source.labels[:4435], minlength=6) / 4435
    for name in ("train", "unlabeled", "val"):
        rows = splits[name].rows
        share = np.bincount(source.labels[rows], minlength=6) / len(rows)
        assert share == pytest.approx(whole, abs=0.005)


def test_the_contracts_statistics_are_those_of_the_patches_that_taught_the_teachers(splits):
    rows = np.union1d(splits["train"].rows, splits["unlabeled"].rows)
    patches = splits["train"].source.read("optical", rows, range(4)).astype(np.float64)
    zscore = json.loads((EXAMPLE / "preprocessing.json").read_text())["zscore"]
    assert zscore["mu"] == pytest.approx(patches.mean(axis=(0, 1, 2)), abs=5e-5)
    assert zscore["sigma"] == pytest.approx(patches.std(axis=(0, 1, 2)), abs=5e-5)


def test_the_teachers_have_the_top1_that_is_written_beside_them(params, splits):
    contract = load_contract(EXAMPLE / "preprocessing.json")
    measured = json.loads((EXAMPLE / "teachers" / "measured.json").read_text())
    assert [list(t.bands) for t in params.teachers] == [[0, 1, 2], [1, 2, 3], [0, 1, 2, 3]]
    for given in params.teachers:
        path = EXAMPLE / given.path
        assert path.stat().st_size < 2_000_000
        teacher = open_teacher(path, given, contract, contract.bind(given.modality, given.bands, 4))
        for name in ("val", "test"):
            split = splits[name]
            logits = teacher.outputs(split.source.read("optical", split.rows, given.bands))[0]
            recorded = measured[path.name][f"top1_{name}"]
            assert (logits.argmax(axis=1) == split.labels).mean() == pytest.approx(
                recorded, abs=0.002
            )


def test_attribution_lies_beside_the_data():
    text = (EXAMPLE / "README.md").read_text()
    assert "CC BY 4.0" in text
    assert "Ashwin Srinivasan" in text
