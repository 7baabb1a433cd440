"""Images of a split, encoded as blocks come or once the encoding is known."""

import json

import numpy as np
import pytest
from tiny_project import make_contract, make_patches

from pipeline.data.blocks import BlockReader
from pipeline.data.encoding import make_student_input
from pipeline.data.image_writer import ImageWriter
from pipeline.data.source import PatchSource, pick_bands
from pipeline.data.splits import Split
from pipeline.params.ingest import StudentParams
from preprocessing.apply import encode
from preprocessing.contract import parse_contract

PATCHES, LABELS = make_patches(90, seed=0)
CONTRACT = parse_contract(json.dumps(make_contract(PATCHES)).encode())
PARAMS = StudentParams(bands=(2, 0), size=4)
CHANNELS = CONTRACT.bind("optical", PARAMS.bands, 4)


def split_of(patches):
    source = PatchSource(
        path=None,
        count=len(patches),
        shapes={"optical": patches.shape[1:]},
        labels=LABELS,
        reader=lambda modality, rows, bands: pick_bands(patches[rows], bands),
    )
    return Split("train", source, np.arange(len(patches)))


@pytest.mark.parametrize("known_before", [True, False])
def test_images_are_the_encoded_good_patches(tmp_path, monkeypatch, known_before):
    monkeypatch.setattr("pipeline.data.blocks.BLOCK", 40)
    patches = PATCHES.copy()
    patches[[5, 60], 0, 0, 0] = np.nan
    patches[[7, 80]] = 9.0  # far beyond what grey level 255 stands for
    split = split_of(patches)
    student = make_student_input(PARAMS, CHANNELS, (4, 4), [(0.0, 255.0)] * 2, CONTRACT.sha256)
    writer = ImageWriter(tmp_path / "train", split, CHANNELS, student if known_before else None)
    reader = BlockReader(split, {"optical": (0, 2)})
    for block in reader:
        writer.add(block)
    outside = writer.finish(split.without(reader.bad), student)
    good = np.setdiff1d(np.arange(90), [5, 60])
    images = np.load(tmp_path / "train" / "images.npy")
    assert np.array_equal(images, encode(patches[good][..., [2, 0]], CHANNELS, student))
    assert np.load(tmp_path / "train" / "rows.npy").tolist() == good.tolist()
    assert np.load(tmp_path / "train" / "labels.npy").tolist() == LABELS[good].tolist()
    assert outside == [7, 80]
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == [
        "images.npy",
        "labels.npy",
        "rows.npy",
    ]
