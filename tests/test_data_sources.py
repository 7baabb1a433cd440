"""Whole runs on every kind of data: what goes in, what the device gets, what is refused."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from PIL import Image
from tiny_project import (
    CLASSES,
    LABELS,
    Project,
    make_contract,
    make_patches,
    make_teacher,
    write_project,
)
from voyager_interpreter import interpret

from pipeline.data.dataset import DatasetSplit
from pipeline.data.synthetic import write_so2sat

LCZ = [f"LCZ {i}" for i in range(1, 18)]
SAR_RANGE = (-0.5, 0.5)


def write_contract(project, contract):
    (project.root / "preprocessing.json").write_text(json.dumps(contract))
    (project.root / "labels.txt").write_text("".join(f"{label}\n" for label in contract["labels"]))


def class_means(standardized, labels, classes):
    """Of every band, (classes, bands)."""
    patches = standardized.mean(axis=(1, 2))
    return np.stack([patches[labels == label].mean(axis=0) for label in range(classes)])


def write_so2sat_project(root):
    """Synthetic So2Sat with a teacher per sensor, 8 bit by percentiles, resized by the device."""
    project = write_project(root)
    for name, patches, seed in (("train", 170, 1), ("test", 85, 2)):
        write_so2sat(root / f"{name}.h5", patches, seed)
    with h5py.File(root / "train.h5") as file:
        labels = file["label"][:].argmax(axis=1)
        scaled = {
            "optical": file["sen2"][:] * 255 / 2.8,
            "sar": (np.clip(file["sen1"][:], *SAR_RANGE) + 0.5) * 255,
        }
    statistics = {
        name: {"mu": v.mean(axis=(0, 1, 2)).tolist(), "sigma": v.std(axis=(0, 1, 2)).tolist()}
        for name, v in scaled.items()
    }
    contract = {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 3, 32, 32]},
        "scaling": {
            "optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]},
            "sar": {"type": "clip_linear", "clip": SAR_RANGE, "dst_range": [0, 255]},
        },
        "zscore": {"enabled": True, **statistics},
        "labels": LCZ,
    }
    write_contract(project, contract)
    teachers = {"optical": [2, 1, 0], "sar": [4, 5]}
    for name, bands in teachers.items():
        mu, sigma = (np.array(statistics[name][k]) for k in ("mu", "sigma"))
        centers = class_means((scaled[name] - mu) / sigma, labels, len(LCZ))[:, bands]
        path = root / "teachers" / f"{name}.onnx"
        make_teacher(path, tuple(bands), contract, size=32, centers=centers)
    project.edit(
        "ingest",
        "teachers",
        to=[
            {"path": f"teachers/{name}.onnx", "modality": name, "bands": bands}
            for name, bands in teachers.items()
        ],
    )
    project.edit(
        "ingest",
        "data",
        to={
            "format": "so2sat-h5",
            "train": {"path": "train.h5"},
            "val": {"fraction": 0.25},
            "test": {"path": "test.h5"},
            "cache": True,
        },
    )
    project.edit("ingest", "doubtful_top1", to=0.0)
    project.edit(
        "ingest",
        "student",
        to={
            "bands": [2, 1, 0],
            "size": 24,
            "interpolation": "bilinear",
            "device_resize": "device",
            "encoding": "percentile",
        },
    )
    return project


def write_ten_bands_project(root):
    """Patches in .npy files, of which the student sees all ten bands."""
    project = write_project(root)
    for name, count, seed in (("train", 240, 1), ("test", 90, 2)):
        patches, labels = make_patches(count, seed)
        images = np.concatenate([patches, patches, patches[..., :2]], axis=3)
        np.save(root / f"{name}.npy", images)
        np.save(root / f"{name}_labels.npy", labels)
    write_contract(project, make_contract(np.load(root / "train.npy")))
    project.edit(
        "ingest",
        "data",
        to={
            "format": "npy",
            "train": {"path": "train.npy", "labels": "train_labels.npy"},
            "val": {"fraction": 0.25},
            "test": {"path": "test.npy", "labels": "test_labels.npy"},
        },
    )
    project.edit("ingest", "student", "bands", to=list(range(10)))
    return project


def write_images(project, images, labels, scaling):
    """Class folders of PNG files, train and test, with contract and teacher of all bands."""
    for name, part in (("train", slice(0, 240)), ("test", slice(240, None))):
        for i, (image, label) in enumerate(zip(images[part], labels[part], strict=True)):
            path = project.root / name / LABELS[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path)
    src, dst = scaling["src_range"], scaling["dst_range"]
    scaled = (images[:240] - src[0]) / (src[1] - src[0]) * (dst[1] - dst[0]) + dst[0]
    mu, sigma = scaled.mean(axis=(0, 1, 2)), scaled.std(axis=(0, 1, 2))
    contract = make_contract(images) | {
        "scaling": {"optical": {"type": "linear", **scaling}},
        "zscore": {"enabled": True, "mu": mu.tolist(), "sigma": sigma.tolist()},
    }
    write_contract(project, contract)
    bands = tuple(range(images.shape[3]))
    centers = class_means((scaled - mu) / sigma, labels[:240], CLASSES)
    make_teacher(project.root / "teachers" / "images.onnx", bands, contract, centers=centers)
    project.edit("ingest", "teachers", to=[{"path": "teachers/images.onnx", "bands": list(bands)}])
    project.edit(
        "ingest",
        "data",
        to={
            "format": "image-folder",
            "train": {"path": "train"},
            "val": {"fraction": 0.25},
            "test": {"path": "test"},
        },
    )


def write_deep_gray_project(root):
    """16-bit gray images that hardly vary: their sigma is a tenth of an 8-bit grey level."""
    project = write_project(root)
    patches, labels = make_patches(330, seed=1)
    band = patches[..., 2:3]
    images = np.rint(38.5 * 257 + (band - band.mean()) / band.std() * 0.1 * 257).astype(np.uint16)
    write_images(project, images, labels, {"src_range": [0, 65535], "dst_range": [0, 255]})
    project.edit("ingest", "student", "bands", to=[0])
    return project


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three projects and what their runs said, two at a time."""
    root = tmp_path_factory.mktemp("sources")
    projects = {
        "deep gray": write_deep_gray_project(root / "gray"),
        "so2sat": write_so2sat_project(root / "so2sat"),
        "ten bands": write_ten_bands_project(root / "ten"),
    }

    # Threads of small networks only wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def work(name):
        first = projects[name].kdpipe("run", env=environment)
        if name != "deep gray":
            return first, None
        fitted = ["--set", "ingest.student.encoding=percentile"]
        return first, projects[name].kdpipe("run", *fitted, env=environment)

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(projects, pool.map(work, projects), strict=True))
    return {name: (projects[name], *results[name]) for name in projects}


def report(project):
    return json.loads((project.artifact("benchmark_report") / "report.json").read_text())


def check_calibration_images(project):
    """The YAML, done to the exported images by a reader of its own, gives calibration's tensors."""
    folder = project.artifact("device_pipeline")
    files = sorted((folder / "tiny-images" / "calibration").iterdir())
    samples = np.load(project.artifact("calibration_set") / "samples.npy")[:, 0]
    assert len(files) == len(samples) == 32
    tensors = interpret((folder / "tiny.yaml").read_text(), files)
    assert np.abs(tensors - samples).max() <= 1e-5
    return samples


# -- So2Sat, two sensors -------------------------------------------------------------------------


def test_so2sat_runs_to_the_end_and_every_leg_passes(runs):
    project, result, _ = runs["so2sat"]
    assert result.returncode == 0, result.stderr
    assert "parity                             4 of 4 legs passed" in result.stderr
    found = report(project)
    assert [leg["passed"] for leg in found["parity"]] == [True] * 4
    assert [m["name"] for m in found["data"]["teachers"]["members"]] == ["optical", "sar"]
    # Each is right far more often than one in seventeen, so each saw its bands in its units.
    assert all(m["top1_val"] > 0.15 for m in found["data"]["teachers"]["members"])


def test_a_report_on_synthetic_data_says_so(runs):
    project, _, _ = runs["so2sat"]
    assert report(project)["data"]["synthetic"] == [
        "kdpipe synth so2sat --patches 170 --seed 1",
        "kdpipe synth so2sat --patches 85 --seed 2",
    ]
    folder = project.artifact("benchmark_report")
    assert "The data are **synthetic**" in (folder / "report.md").read_text()
    assert "The data are <strong>synthetic</strong>" in (folder / "report.html").read_text()


def test_stored_images_are_the_reflectances_between_the_fitted_ends(runs):
    project, _, _ = runs["so2sat"]
    given = json.loads(project.artifact("student_input").read_text())
    split = DatasetSplit.load(project.artifact("dataset") / "train")
    with h5py.File(project.root / "train.h5") as file:
        patches = file["sen2"][:][split.rows][..., [2, 1, 0]]
        assert np.array_equal(split.labels, file["label"][:].argmax(axis=1)[split.rows])
    low, high = np.array(given["grey_lo"]), np.array(given["grey_hi"])
    scaled = patches * 255 / 2.8
    levels = (scaled - low) / (high - low) * 255
    # Each is the nearest level; float32 rounds no more than eight times before.
    off = np.abs(split.images - np.clip(levels, 0, 255)) - 0.5
    assert (off <= 8 * 2.0**-24 * ((np.abs(scaled) + np.abs(low)) / (high - low) + 1) * 255).all()
    assert split.images.std(axis=(0, 1, 2)).min() > 30


def test_the_device_resizes_so2sat_to_what_the_student_was_trained_on(runs):
    project, _, _ = runs["so2sat"]
    text = (project.artifact("device_pipeline") / "tiny.yaml").read_text()
    assert "- resize:\n            width: 24\n            height: 24\n" in text
    assert check_calibration_images(project).shape == (32, 3, 24, 24)
    image = next((project.artifact("device_pipeline") / "tiny-images").rglob("*.png"))
    with Image.open(image) as opened:
        assert (opened.size, opened.mode) == ((32, 32), "RGB")


def test_percentiles_make_the_devices_constants_exact(runs):
    project, _, _ = runs["so2sat"]
    assert report(project)["device"]["device_constants"]["worst"] < 1e-6
    tight = ["--set", "compile.max_constant_error=0.000001"]
    result = project.kdpipe("run", "--stage", "compile", *tight)
    assert (result.returncode, " fresh " in result.stderr) == (0, True)


def test_the_copy_of_the_bands_is_written_once(runs):
    project, _, _ = runs["so2sat"]

    def copies():
        files = (project.root / "runs" / ".cache").glob("*.npy")
        return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns, f.stat().st_size) for f in files}

    before = copies()
    header = 128
    expected = [header + n * bands * 32 * 32 * 4 for n in (85, 170) for bands in (2, 3)]
    assert sorted(size for _, _, size in before.values()) == sorted(expected)
    result = project.kdpipe("run", "--stage", "ingest", "--force")
    assert result.returncode == 0, result.stderr
    assert copies() == before


def test_reflectances_in_the_contracts_encoding_are_told_of_percentile(runs):
    project, result, _ = runs["so2sat"]
    assert "8-bit encoding" not in result.stderr
    words = ["--run", "coarse", "--stage", "ingest", "--set", "ingest.student.encoding=contract"]
    coarse = project.kdpipe("run", *words)
    assert coarse.returncode == 0
    for band in (2, 1, 0):
        match = re.search(
            rf"warning  8-bit encoding: the middle 98 % of optical band {band} use (\d+) grey "
            r"levels \(([\d.]+) dB\); ingest.student.encoding: percentile would use most of 256",
            coarse.stderr,
        )
        assert match, coarse.stderr
        assert int(match[1]) < 48


def test_a_truncated_hdf5_file_ends_the_run_with_its_name(runs, tmp_path):
    whole, _, _ = runs["so2sat"]
    project = Project(tmp_path / "project")
    shutil.copytree(whole.root, project.root, ignore=shutil.ignore_patterns("runs"))
    path = project.root / "test.h5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = project.kdpipe("run")
    assert result.returncode == 3
    assert "test.h5 is not a readable HDF5 file" in result.stderr
    assert "truncated" in result.stderr
    assert not (project.folder / "manifest.json").exists()


# -- other numbers of bands ----------------------------------------------------------------------


def test_ten_bands_get_no_yaml_and_the_report_says_why(runs):
    project, result, _ = runs["ten bands"]
    assert result.returncode == 0, result.stderr
    assert "warning  no Voyager pipeline YAML: the student sees 10 bands" in result.stderr
    assert "2 of 2 legs passed" in result.stderr
    folder = project.artifact("device_pipeline")
    assert [f.name for f in folder.iterdir()] == ["no-pipeline-yaml.txt"]
    found = report(project)
    assert found["device"]["pipeline_yaml"] is None
    assert "the student sees 10 bands" in found["device"]["pipeline_yaml_obstacle"]
    assert [leg["passed"] for leg in found["parity"]] == [None, None, True, True]
    for leg in found["parity"][:2]:
        assert leg["found"].startswith("does not apply: the student sees 10 bands")
    text = (project.artifact("benchmark_report") / "report.md").read_text()
    assert "No Voyager pipeline YAML: the student sees 10 bands" in text


def test_npy_files_arrive_as_they_are(runs):
    project, _, _ = runs["ten bands"]
    split = DatasetSplit.load(project.artifact("test_set"))
    stored = np.load(project.root / "test.npy")[split.rows]
    assert np.abs(split.images - stored * 255 / 2.8).max() <= 0.5 + 1e-4
    assert np.array_equal(split.labels, np.load(project.root / "test_labels.npy"))


def test_constants_that_the_device_would_lose_stop_compile_with_the_band(runs):
    _, coarse, _ = runs["deep gray"]
    assert coarse.returncode == 4
    assert "compile: gate device_constants did not pass" in coarse.stderr
    assert "three decimals of mean / 255 and std / 255: the std of band 0 vanishes" in coarse.stderr
    assert "ingest.student.encoding: percentile makes them exact" in coarse.stderr
    assert "benchmark" not in coarse.stderr


def test_constants_that_the_device_would_round_too_far_are_named_too(finished):
    changes = ["--set", "compile.max_constant_error=0.005"]
    result = finished.kdpipe("run", "--stage", "compile", *changes)
    assert result.returncode == 4
    constants = finished.manifest["stages"]["compile"]["facts"]["device_constants"]["channels"]
    for channel in constants:
        words = f"band {channel['band']} is off by up to {channel['worst']:.3g} sigma there"
        assert (words in result.stderr) == (channel["worst"] > 0.005)
    assert max(channel["worst"] for channel in constants) > 0.005


def test_one_deep_band_goes_through_a_yaml_of_one_channel(runs):
    project, _, result = runs["deep gray"]
    assert result.returncode == 0, result.stderr
    found = report(project)
    assert [leg["passed"] for leg in found["parity"]] == [True] * 4
    text = (project.artifact("device_pipeline") / "tiny.yaml").read_text()
    assert "- convert-color:\n            format: RGB2GRAY\n" in text
    assert "input_tensor_shape: [1, 1, 16, 16]\n    input_color_format: GRAY\n" in text
    assert check_calibration_images(project).shape == (32, 1, 16, 16)
    image = next((project.artifact("device_pipeline") / "tiny-images").rglob("*.png"))
    with Image.open(image) as opened:
        assert (opened.size, opened.mode) == ((16, 16), "L")


def test_deep_images_keep_what_eight_bits_of_the_contract_would_lose(runs):
    project, _, _ = runs["deep gray"]
    split = DatasetSplit.load(project.artifact("test_set"))
    names = [p for label in LABELS for p in sorted((project.root / "test" / label).iterdir())]
    deep = np.stack([np.asarray(Image.open(p)) for p in names])[split.rows].astype(np.float64)
    assert deep.std() / 257 < 0.2
    # 0.1 % of the values are clipped at either end.
    correlation = np.corrcoef(split.images.ravel(), deep.ravel())[0, 1]
    assert correlation > 0.999


def test_8_bit_images_arrive_pixel_by_pixel(project):
    random = np.random.default_rng(0)
    labels = np.arange(330) % CLASSES
    images = random.integers(0, 256, (330, 4, 4, 3)).astype(np.uint8)
    images[..., 0] = np.clip(images[..., 0] // 4 + 60 * labels[:, None, None], 0, 255)
    write_images(project, images, labels, {"src_range": [0, 255], "dst_range": [0, 255]})
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0, result.stderr
    given = DatasetSplit.load(project.artifact("test_set"))
    names = [p for label in LABELS for p in sorted((project.root / "test" / label).iterdir())]
    for image, label, row in zip(given.images, given.labels, given.rows, strict=True):
        with Image.open(names[row]) as opened:
            assert np.array_equal(image, np.asarray(opened)[..., [2, 1, 0]])
        assert names[row].parent.name == LABELS[label]
    assert len(given.labels) == 90


# -- bad data ------------------------------------------------------------------------------------


def edit_patches(project, split, edit):
    path = project.root / f"{split}.npz"
    with np.load(path) as archive:
        images, labels = archive["images"].copy(), archive["labels"]
    edit(images, labels)
    np.savez(path, images=images, labels=labels)


def spoil(rows):
    def edit(images, labels):
        images[rows, 1, 2, 0] = np.nan

    return edit


def test_bad_patches_of_any_split_are_counted_and_the_first_listed(project):
    edit_patches(project, "test", spoil(range(2, 16, 2)))
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 3
    words = "test.npz: 7 patches of test have NaN or infinity, in rows 2, 4, 6, 8, 10, ...; repair"
    assert words in result.stderr


def test_bad_patches_are_dropped_where_that_is_asked_for(project):
    edit_patches(project, "train", spoil([7, 30]))
    edit_patches(project, "test", spoil([5]))
    project.edit("ingest", "data", "bad_patches", to="drop")
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0, result.stderr
    assert "test.npz: 1 patches of test have NaN or infinity, in rows 5; dropped" in result.stderr
    splits = project.manifest["stages"]["ingest"]["facts"]["splits"]
    dropped = {name: split["bad_patches_dropped"] for name, split in splits.items()}
    assert dropped["train"] + dropped["val"] == 2
    assert dropped["test"] == 1
    folders = [project.artifact("dataset") / name for name in ("train", "val")]
    kept = [DatasetSplit.load(folder) for folder in folders]
    rows = np.concatenate([split.rows for split in kept])
    assert sorted(rows) == [row for row in range(240) if row not in (7, 30)]
    assert [splits[n]["patches"] for n in ("train", "val")] == [len(s.images) for s in kept]
    assert 5 not in DatasetSplit.load(project.artifact("test_set")).rows


def test_dropping_a_whole_class_is_refused(project):
    def edit(images, labels):
        images[labels == 2] = np.inf

    edit_patches(project, "train", edit)
    project.edit("ingest", "data", "bad_patches", to="drop")
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 3
    assert "data.train has no patch of class 2" in result.stderr


def leak(project):
    """Rows 10 and 100 of train are rows 3 and 20 of test."""
    with np.load(project.root / "train.npz") as archive:
        seen = archive["images"][[10, 100]]

    def edit(images, labels):
        images[[3, 20]] = seen

    edit_patches(project, "test", edit)
    project.edit("ingest", "data", "train", to={"path": "train.npz", "rows": [0, 180]})
    project.edit("ingest", "data", "val", to={"path": "train.npz", "rows": [180, 240]})


LEAK = "2 patches of train are in test too (row of train = row of test): 10 = 3, 100 = 20"


def test_the_same_patch_in_two_splits_is_a_warning_with_its_rows(project):
    leak(project)
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0, result.stderr
    assert f"warning  {LEAK}" in result.stderr
    assert project.manifest["stages"]["ingest"]["facts"]["leaks"] == [
        {"one": "train", "other": "test", "pairs": [[10, 3], [100, 20]], "count": 2}
    ]


def test_the_same_patch_in_two_splits_is_refused_where_that_is_asked_for(project):
    leak(project)
    project.edit("ingest", "data", "on_leak", to="error")
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 3
    assert f"Error: {LEAK}; remove them, or set ingest.data.on_leak: warn" in result.stderr
    assert not (project.folder / "manifest.json").exists()
