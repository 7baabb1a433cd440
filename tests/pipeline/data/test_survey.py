import json

import numpy as np
import pytest
from tiny_project import make_contract, make_patches

from pipeline.data.encoding import encoding_quality
from pipeline.data.formats.npz import open_npz
from pipeline.data.splits import Split
from pipeline.data.survey import find_leaks, rows_elsewhere, survey
from preprocessing.contract import parse_contract

PATCHES, _ = make_patches(500, seed=0)
CONTRACT = parse_contract(json.dumps(make_contract(PATCHES)).encode())


def channels_of(*bands):
    return {"optical": CONTRACT.bind("optical", bands, 4)}


def split_of(tmp_path, patches, name="train"):
    np.savez(tmp_path / f"{name}.npz", images=patches)
    source = open_npz(tmp_path / f"{name}.npz", {"optical": "images"}, "labels")
    return Split(name, source, np.arange(len(patches), dtype=np.int64))


def test_statistics_are_numpys_in_contract_units(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.blocks.BLOCK", 64)  # so that blocks are merged
    seen = []
    found = survey(split_of(tmp_path, PATCHES), channels_of(0, 3), progress=seen.append)
    assert sum(seen) == 500
    of = found.statistics["optical"]
    picked = PATCHES[..., [0, 3]].astype(np.float64)
    scaled = picked * 255 / 2.8
    assert of.bands == (0, 3)
    assert of.mean == pytest.approx(scaled.mean(axis=(0, 1, 2)), rel=1e-6)
    assert of.sigma == pytest.approx(scaled.std(axis=(0, 1, 2)), rel=1e-6)
    assert of.minimum == pytest.approx(picked.min(axis=(0, 1, 2)))
    assert of.maximum == pytest.approx(picked.max(axis=(0, 1, 2)))


def test_the_sample_is_thin_and_even(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.survey.SAMPLE", 700)
    monkeypatch.setattr("pipeline.data.blocks.BLOCK", 37)
    of = survey(split_of(tmp_path, PATCHES), channels_of(1)).statistics["optical"]
    stride = 500 * 16 // 700 | 1
    values = (PATCHES[..., 1].reshape(-1) * np.float32(255 / 2.8))[::stride]
    assert len(of.sample) == len(values)
    assert of.sample[:, 0] == pytest.approx(values, rel=1e-5)


def test_patches_with_nan_or_infinity_in_a_seen_band_are_found(tmp_path):
    patches = PATCHES.copy()
    patches[7, 0, 0, 1] = np.nan
    patches[9, 3, 3, 3] = np.inf
    patches[11, 0, 0, 2] = np.nan  # a band nobody sees
    found = survey(split_of(tmp_path, patches), channels_of(1, 3))
    assert found.bad.tolist() == [7, 9]
    assert len(found.rows) == len(found.hashes) == 498
    assert np.isfinite(found.statistics["optical"].mean).all()


def test_the_same_patch_in_two_splits_is_reported_with_its_rows(tmp_path):
    test, _ = make_patches(50, seed=1)
    test[[3, 20]] = PATCHES[[400, 10]]
    surveys = {
        name: survey(split_of(tmp_path, patches, name), channels_of(0, 1, 2, 3))
        for name, patches in (("train", PATCHES), ("test", test))
    }
    (leak,) = find_leaks(surveys)
    assert (leak.one, leak.other, leak.count) == ("train", "test", 2)
    assert leak.pairs == ((10, 20), (400, 3))
    assert find_leaks({"train": surveys["train"]}) == []


def test_every_row_that_is_in_another_split_is_listed_repeated_ones_too(tmp_path):
    train = PATCHES[:60].copy()
    train[50] = train[10]  # a copy of a copy is in test too
    val, test = PATCHES[30:45], PATCHES[:20]
    surveys = {
        name: survey(split_of(tmp_path, patches, name), channels_of(0, 1, 2, 3))
        for name, patches in (("train", train), ("val", val), ("test", test))
    }
    assert rows_elsewhere(surveys).tolist() == [*range(20), *range(30, 45), 50]


def test_the_quality_of_an_encoding_by_hand():
    values = np.random.default_rng(0).normal(10, 3, 200_000).astype(np.float32)
    wide = encoding_quality(values, 0, 255)
    # Rounding to whole levels: noise 1/12, signal 9; the middle 98 % are 2 * 2.326 sigma wide.
    assert wide.sqnr_db == pytest.approx(10 * np.log10(9 * 12), abs=0.1)
    assert wide.levels98 == pytest.approx(2 * 2.326 * 3, rel=0.02)
    assert wide.clipped < 0.002
    fitted = encoding_quality(values, 0, 20)
    assert fitted.levels98 == pytest.approx(wide.levels98 * 255 / 20, rel=0.01)
    assert fitted.sqnr_db > wide.sqnr_db + 15
    assert encoding_quality(np.array([0.0, 255.0, 7.0], np.float32), 0, 255).sqnr_db is None
    assert encoding_quality(values, 9, 11).clipped > 0.7
