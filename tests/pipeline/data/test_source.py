import zipfile

import h5py
import numpy as np
import png
import pytest
import tifffile
from PIL import Image

from pipeline.data.formats.image_folder import open_image_folder
from pipeline.data.formats.npy import open_npy
from pipeline.data.formats.npz import open_npz
from pipeline.data.formats.so2sat_h5 import open_so2sat
from pipeline.data.source import copy_bands, open_source
from pipeline.data.synthetic import write_so2sat
from pipeline.params.sources import DataParams
from pipeline.run.errors import InputError


@pytest.fixture(scope="module")
def so2sat(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.h5"
    write_so2sat(path, 60, seed=3)
    return path


BOTH = {"optical": "sen2", "sar": "sen1"}


def rows_of(*rows):
    return np.array(rows, np.int64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_gives_what_the_file_holds_without_reading_it_whole(tmp_path, save, order):
    images = np.random.default_rng(0).normal(size=(20, 3, 5, 4)).astype(np.float32, order=order)
    save(tmp_path / "a.npz", other=np.zeros(3), images=images, labels=np.arange(20) % 3)
    source = open_npz(tmp_path / "a.npz", {"optical": "images"}, "labels")
    assert (source.count, source.shape("optical")) == (20, (3, 5, 4))
    rows = rows_of(0, 7, 19)
    assert np.array_equal(source.read("optical", rows, (3, 0)), images[rows][..., [3, 0]])
    assert source.labels.tolist() == (np.arange(20) % 3).tolist()


def test_npy_gives_what_the_files_hold(tmp_path):
    images = np.arange(2 * 2 * 2 * 3, dtype=np.uint16).reshape(2, 2, 2, 3)
    np.save(tmp_path / "i.npy", images)
    np.save(tmp_path / "l.npy", np.array([1, 0]))
    source = open_npy(tmp_path / "i.npy", "optical", tmp_path / "l.npy")
    assert np.array_equal(source.read("optical", rows_of(1), (2, 1)), images[1:, ..., [2, 1]])
    assert open_npy(tmp_path / "i.npy", "optical", None).labels is None


def test_so2sat_gives_both_sensors_and_labels(so2sat):
    source = open_so2sat(so2sat, BOTH, "label")
    assert source.shapes == {"optical": (32, 32, 10), "sar": (32, 32, 8)}
    assert source.synthetic == "kdpipe synth so2sat --patches 60 --seed 3"
    with h5py.File(so2sat) as file:
        assert np.array_equal(source.labels, file["label"][:].argmax(axis=1))
        for rows in (rows_of(3), rows_of(1, 2, 40), np.arange(60), rows_of(0, 59)):
            found = source.read("optical", rows, (2, 1, 0))
            assert np.array_equal(found, file["sen2"][:][rows][..., [2, 1, 0]])


def write_images(folder, classes=("water", "forest"), count=3):
    expected = {}
    random = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = random.integers(0, 256, (4, 6, 3)).astype(np.uint8)
            Image.fromarray(image).save(folder / name / f"{i}.png")
            expected[label, i] = image
    return expected


@pytest.mark.parametrize("named", [("water", "forest"), ("0_water", "1_forest")])
def test_an_image_folder_gives_its_images_in_the_order_of_the_classes(tmp_path, named):
    expected = write_images(tmp_path / "train", named)
    source = open_image_folder(tmp_path / "train", "optical", ["water", "forest"])
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(
        source.read("optical", rows_of(1, 5), (2, 0)),
        np.stack([expected[0, 1], expected[1, 2]])[..., [2, 0]],
    )


def deep(shape):
    return np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)


def save_png16(path, image):
    height, width, channels = image.shape
    writer = png.Writer(
        width, height, bitdepth=16, greyscale=channels < 3, alpha=channels in (2, 4)
    )
    with path.open("wb") as file:
        writer.write(file, image.reshape(height, -1).tolist())


def save_pillow(path, image):
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)


@pytest.mark.parametrize(
    ("name", "image", "save"),
    [
        ("a.png", deep((4, 5, 1)), save_png16),
        ("a.png", deep((4, 5, 2)), save_png16),
        ("a.png", deep((4, 5, 3)), save_png16),
        ("a.png", deep((4, 5, 4)), save_png16),
        ("a.tif", deep((4, 5, 4)), tifffile.imwrite),
        ("a.TIFF", deep((4, 5)), tifffile.imwrite),
        ("a.tif", (deep((4, 5, 3)) >> 8).astype(np.uint8), tifffile.imwrite),
        ("a.png", (deep((4, 5, 1)) >> 8).astype(np.uint8), save_pillow),
        ("a.png", (deep((4, 5, 2)) >> 8).astype(np.uint8), save_pillow),
        ("a.png", (deep((4, 5, 4)) >> 8).astype(np.uint8), save_pillow),
    ],
)
def test_images_keep_their_depth_and_channels(tmp_path, name, image, save):
    (tmp_path / "t" / "x").mkdir(parents=True)
    save(tmp_path / "t" / "x" / name, image)
    source = open_image_folder(tmp_path / "t", "optical", ["x"])
    whole = image[..., None] if image.ndim == 2 else image
    assert source.shape("optical") == whole.shape
    found = source.read("optical", rows_of(0), range(whole.shape[2]))
    assert found.dtype == image.dtype
    assert np.array_equal(found[0], whole)


def test_jpeg_is_read_as_pillow_reads_it(tmp_path):
    (tmp_path / "t" / "x").mkdir(parents=True)
    path = tmp_path / "t" / "x" / "a.jpg"
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path)
    source = open_image_folder(tmp_path / "t", "optical", ["x"])
    with Image.open(path) as image:
        assert np.array_equal(source.read("optical", rows_of(0), range(3))[0], np.asarray(image))


# -- what can be wrong ---------------------------------------------------------------------------


def write_h5(path, **datasets):
    defaults = {
        "sen1": np.zeros((5, 4, 4, 8)),
        "sen2": np.zeros((5, 4, 4, 10)),
        "label": np.eye(17)[:5],
    }
    with h5py.File(path, "w") as file:
        for name, values in {**defaults, **datasets}.items():
            if values is not None:
                file[name] = values
    return path


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ({"sen1": None}, r"a\.h5 has no dataset 'sen1'; it has label, sen2"),
        (
            {"sen2": np.zeros((5, 4, 4))},
            r"'sen2' must be numbers of shape \(patches, height, width",
        ),
        ({"sen2": np.zeros((6, 4, 4, 10))}, r"differ in length: 'sen2' has 6, 'sen1' has 5"),
        ({"label": np.eye(17)[:4]}, r"'label' has 4"),
        ({"label": np.arange(5)}, r"'label' must be one-hot, \(patches, classes\), not of shape"),
        ({"label": np.eye(17)[:5] * 2}, r"'label' is not one-hot in 5 rows, the first is row 0"),
        (
            {"label": np.vstack([np.eye(17)[:4], np.zeros((1, 17))])},
            r"not one-hot in 1 rows, the first is row 4: \[0.0",
        ),
    ],
)
def test_an_hdf5_file_that_is_not_as_described_is_refused(tmp_path, datasets, words):
    with pytest.raises(InputError, match=words):
        open_so2sat(write_h5(tmp_path / "a.h5", **datasets), BOTH, "label")


def test_a_truncated_hdf5_file_is_refused(so2sat, tmp_path):
    data = so2sat.read_bytes()
    (tmp_path / "a.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.h5 is not a readable HDF5 file: .*truncated"):
        open_so2sat(tmp_path / "a.h5", BOTH, "label")


def test_damage_inside_a_compressed_hdf5_file_is_named_by_its_rows(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        random = np.random.default_rng(0).normal(size=(8, 16, 16, 10))
        file.create_dataset("sen2", data=random, chunks=(1, 16, 16, 10), compression="gzip")
        info = file["sen2"].id.get_chunk_info(5)
    with path.open("r+b") as file:
        file.seek(info.byte_offset)
        file.write(b"\xff" * 64)
    source = open_so2sat(path, {"optical": "sen2"}, "label")
    assert source.labels is None
    with pytest.raises(InputError, match=r"'sen2' can't be read in rows 4 to 6 \(truncated\?\)"):
        source.read("optical", rows_of(4, 5, 6), (0,))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 2, 2))}, r"'images' must be numbers of shape"),
        ({"images": np.array([["a"] * 2] * 4).reshape(2, 2, 2, 1)}, r"'images' must be numbers"),
        ({"labels": np.zeros((4, 2))}, r"'labels' must be one class index per patch, not float64"),
        ({"labels": np.zeros(3, int)}, r"'images' has 4, 'labels' has 3"),
    ],
)
def test_an_archive_that_is_not_as_described_is_refused(tmp_path, arrays, words):
    given_ = {"images": np.zeros((4, 2, 2, 3)), "labels": np.zeros(4, int), **arrays}
    np.savez(tmp_path / "a.npz", **given_)
    with pytest.raises(InputError, match=words):
        open_npz(tmp_path / "a.npz", {"optical": "images"}, "labels")


def test_archives_with_objects_or_damage_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="holds Python objects"):
        open_npz(tmp_path / "a.npz", {"optical": "images"}, "labels")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", b"nonsense")
    with pytest.raises(InputError, match=r"b\.npz is not a readable \.npz file"):
        open_npz(tmp_path / "b.npz", {"optical": "images"}, "labels")
    (tmp_path / "c.npy").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"c\.npy is not a readable \.npy file"):
        open_npy(tmp_path / "c.npy", "optical", None)


def test_image_folders_that_are_not_as_described_are_refused(tmp_path):
    write_images(tmp_path / "train")
    with pytest.raises(InputError, match="its folders are forest, water; needed is one per class"):
        open_image_folder(tmp_path / "train", "optical", ["water", "town"])
    source = open_image_folder(tmp_path / "train", "optical", ["water", "forest"])
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "train" / "forest" / "1.png")
    with pytest.raises(InputError, match=r"train/forest/1\.png is \(5, 6, 3\)"):
        source.read("optical", rows_of(0, 4), (0,))
    (tmp_path / "train" / "forest" / "1.png").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"train/forest/1\.png is not a readable image"):
        source.read("optical", rows_of(4), (0,))
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).convert("P").save(
        tmp_path / "train" / "forest" / "1.png"
    )
    with pytest.raises(InputError, match="its mode is P"):
        source.read("optical", rows_of(4), (0,))
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no image \(\.png, \.jpg"):
        open_image_folder(tmp_path / "empty", "optical", ["x"])
    with pytest.raises(InputError, match="is a file; format image-folder needs a folder"):
        open_image_folder(tmp_path / "train" / "water" / "0.png", "optical", ["x"])


def test_formats_of_one_modality_refuse_two(tmp_path):
    data = DataParams(format="npy", modalities={"optical": "", "sar": ""})
    with pytest.raises(InputError, match="format npy holds one modality"):
        open_source(data, tmp_path / "x.npy", None, ["a"])


def test_an_unknown_modality_is_answered_with_those_there_are(so2sat):
    source = open_so2sat(so2sat, BOTH, "label")
    with pytest.raises(InputError, match=r"a\.h5 has no modality 'radar' .*; it has optical, sar"):
        source.read("radar", rows_of(0), (0,))


# -- copies ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A source whose patches are their row numbers."""
    path = tmp_path_factory.mktemp("data") / "n.npy"
    np.save(path, np.arange(5000, dtype=np.int64).reshape(-1, 1, 1, 1))
    return open_npy(path, "optical", None)


def test_a_copy_holds_the_bands_in_float32_and_is_written_once(so2sat, tmp_path):
    source = open_so2sat(so2sat, BOTH, "label")
    bands = {"optical": [0, 1, 2], "sar": [5]}
    copy = copy_bands(source, bands, "digest", tmp_path, block=13)
    rows = rows_of(4, 5, 33)
    assert np.array_equal(
        copy.read("optical", rows, (2, 0)), source.read("optical", rows, (2, 0)).astype(np.float32)
    )
    assert np.array_equal(
        copy.read("sar", rows, (5,)), source.read("sar", rows, (5,)).astype(np.float32)
    )
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(files) == 2
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 60 * 1024 * 4 * 4.1
    copy_bands(source, bands, "digest", tmp_path, block=13)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files
    copy_bands(source, bands, "another", tmp_path, block=13)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_copy_that_fails_leaves_nothing(numbered, tmp_path):
    from dataclasses import replace

    def broken(modality, rows, bands):
        if rows[0]:
            raise InputError("row 100 is damaged")
        return np.zeros((len(rows), 1, 1, 1))

    with pytest.raises(InputError, match="row 100"):
        copy_bands(replace(numbered, reader=broken), {"optical": [0]}, "d", tmp_path, block=100)
    assert list(tmp_path.iterdir()) == []
