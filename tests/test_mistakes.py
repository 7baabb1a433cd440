"""What users get wrong: one line each, the documented status, and nothing half written."""

import shutil

import numpy as np
import onnx
import pytest
from tiny_project import make_patches, make_teacher


def overwrite(project, file="train.npz", **arrays):
    """Replace arrays of an archive."""
    with np.load(project.root / file) as archive:
        merged = {**archive, **arrays}
    np.savez(project.root / file, **merged)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_patch(project):
    images, _ = make_patches(240, seed=1)
    images[[7, 30]] = np.nan
    overwrite(project, images=images)


def label_out_of_range(project):
    overwrite(project, labels=np.append(np.arange(239) % 3, 9))


def no_class_2(project):
    overwrite(project, labels=np.arange(240) % 2)


def other_labels(project):
    (project.root / "labels.txt").write_text("water\ntown\nforest\n")


def fewer_labels(project):
    (project.root / "labels.txt").write_text("water\nforest\n")


def teacher(project, **options):
    path = project.root / "teachers" / "dense_a.onnx"
    make_teacher(path, options.pop("bands", (0, 1, 2)), project.contract, **options)
    return path


def weights_alone(project):
    path = project.root / "teachers" / "dense_a.onnx"
    path.rename(path.with_suffix(".pth"))
    project.edit("ingest", "teachers", 0, "path", to="teachers/dense_a.pth")


def two_outputs(project):
    path = teacher(project)
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info("pooled", 1, ["N", 3, 1, 1]))
    onnx.save(model, path)


def outside_data(project):
    """An ONNX whose weights lie in a file beside its folder."""
    path = teacher(project, external="weights.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    shutil.move(path.parent / "weights.bin", project.root / "weights.bin")


def external_data_gone(project):
    (teacher(project, external="weights.bin").parent / "weights.bin").unlink()


def statistics_in_units_of_one(project):
    for key in ("mu", "sigma"):
        project.edit_contract("zscore", key, to=[v / 255 for v in project.contract["zscore"][key]])


def overlap(project):
    project.edit("ingest", "data", "test", to={"path": "train.npz", "rows": [200, 240]})


def constant_band(project):
    images, _ = make_patches(240, seed=1)
    images[..., 3] = 0.5
    overwrite(project, images=images)


MISTAKES = {
    "contract missing": (
        lambda p: (p.root / "preprocessing.json").unlink(),
        3,
        "ingest.contract: there is no preprocessing.json",
    ),
    "contract not JSON": (
        lambda p: (p.root / "preprocessing.json").write_text('{"input": '),
        3,
        "preprocessing.json is not JSON",
    ),
    "mu shorter than bands": (
        lambda p: [p.edit_contract("zscore", k, to=[20.0, 60.0, 60.0]) for k in ("mu", "sigma")],
        3,
        "preprocessing.json: zscore.mu has 3 entries, but modality 'optical' has 4 bands",
    ),
    "sigma 0": (
        lambda p: p.edit_contract("zscore", "sigma", 1, to=0),
        3,
        "preprocessing.json: zscore.sigma[1] is 0",
    ),
    "statistics divided by 255": (
        statistics_in_units_of_one,
        3,
        "mu and sigma are not those of the training split, in units after scaling (4 of 4 bands): "
        "optical band 0: mu 0.",
    ),
    "unknown modality": (
        lambda p: p.edit("ingest", "teachers", 0, "modality", to="sar"),
        3,
        "train.npz has no modality 'sar' (data.modalities); it has optical",
    ),
    "band out of range": (
        lambda p: p.edit("ingest", "student", "bands", to=[0, 1, 4]),
        3,
        "band 4 does not exist: modality 'optical' has bands 0 to 3",
    ),
    "NaN in data": (
        nan_patch,
        3,
        "train.npz: 2 patches of train have NaN or infinity, in rows 7, 30; repair them, or set "
        "ingest.data.bad_patches: drop",
    ),
    "label out of range": (
        label_out_of_range,
        3,
        "train.npz: its labels hold 9 in row 239 (1 such rows), but preprocessing.json labels 3",
    ),
    "class without a sample": (no_class_2, 3, "data.train has no patch of class 2"),
    "constant band": (constant_band, 3, "optical band 3 is constant (45.5357) over"),
    "labels.txt in another order": (
        other_labels,
        3,
        "labels.txt: class 1 is 'town', but preprocessing.json labels[1] is 'forest'",
    ),
    "labels.txt too short": (fewer_labels, 3, "labels.txt names 2 classes and preprocessing.json"),
    "data missing": (
        lambda p: (p.root / "train.npz").unlink(),
        3,
        "ingest.data.train: there is no train.npz",
    ),
    "data not an archive": (
        lambda p: truncate(p.root / "train.npz"),
        3,
        "train.npz is not a readable .npz file",
    ),
    "array missing": (
        lambda p: p.edit("ingest", "data", "modalities", to={"optical": "sen2"}),
        3,
        "train.npz has no array 'sen2' (data.modalities.optical); it has images, labels",
    ),
    "images of rank 3": (
        lambda p: overwrite(p, images=np.zeros((240, 4, 4))),
        3,
        "train.npz: 'images' must be numbers of shape (patches, height, width, bands)",
    ),
    "no patches": (
        lambda p: overwrite(p, images=np.zeros((0, 4, 4, 4)), labels=np.zeros(0, np.int64)),
        3,
        "data.train: train.npz has no patches",
    ),
    "test split with fewer bands": (
        lambda p: overwrite(p, "test.npz", images=make_patches(90, seed=2)[0][..., :3]),
        3,
        "test.npz: modality 'optical' has 3 bands, but train.npz has 4",
    ),
    "a file where the runs should be": (
        lambda p: (p.root / "runs").write_text(""),
        3,
        "runs/tiny/manifest.json can't be read: Not a directory",
    ),
    "rows beyond the end": (
        lambda p: p.edit("ingest", "data", "test", "rows", to=[0, 91]),
        3,
        "data.test.rows is [0, 91], but test.npz has rows 0 to 90",
    ),
    "splits overlap": (overlap, 3, "share 32 rows of train.npz, the first is 200"),
    "split without a file": (
        lambda p: p.edit("ingest", "data", "test", to={}),
        3,
        "ingest.data.test.path is missing",
    ),
    "training split as a fraction": (
        lambda p: p.edit("ingest", "data", "train", to={"fraction": 0.5}),
        3,
        "give the training split a path",
    ),
    "teacher missing": (
        lambda p: (p.root / "teachers" / "dense_a.onnx").unlink(),
        3,
        "ingest.teachers[0]: there is no teachers/dense_a.onnx",
    ),
    "pattern without a match": (
        lambda p: p.edit("ingest", "teachers", 0, "path", to="teachers/cnn_*.onnx"),
        3,
        "ingest.teachers[0].path: no file matches 'teachers/cnn_*.onnx'",
    ),
    "teacher that is weights alone": (
        weights_alone,
        3,
        "ingest.teachers[0]: teachers/dense_a.pth holds weights without their network; name it",
    ),
    "teacher truncated": (
        lambda p: truncate(p.root / "teachers" / "dense_a.onnx"),
        3,
        "dense_a.onnx is not a",
    ),
    "teacher with two inputs": (
        lambda p: teacher(p, inputs=2),
        3,
        "dense_a.onnx has 2 inputs (input, other1); a teacher has one",
    ),
    "teacher with two outputs": (
        two_outputs,
        3,
        "dense_a.onnx has 2 outputs (logits, pooled); a teacher has one",
    ),
    "teacher with other channels": (
        lambda p: teacher(p, bands=(0, 1)),
        3,
        "dense_a.onnx: its input has 2 channels (NCHW), but its bands in kdpipe.yaml are [0, 1, 2]",
    ),
    "teacher with other classes": (
        lambda p: teacher(p, classes=5),
        3,
        "dense_a.onnx has 5 classes, but preprocessing.json labels 3",
    ),
    "teacher with integer input": (
        lambda p: teacher(p, dtype=onnx.TensorProto.DOUBLE),
        3,
        "dense_a.onnx: its input is double; float or float16 is needed",
    ),
    "weights outside the folder": (
        outside_data,
        3,
        "dense_a.onnx: its external data '../weights.bin' lies outside its folder; refused",
    ),
    "external weights gone": (
        external_data_gone,
        3,
        "dense_a.onnx: its external data 'weights.bin' is missing beside it",
    ),
    "unknown key": (
        lambda p: p.edit("ingest", "techers", to=[]),
        2,
        "kdpipe.yaml: unknown key 'ingest.techers'; did you mean 'teachers' or 'teacher_mode'?",
    ),
    "bands of the wrong kind": (
        lambda p: p.edit("ingest", "student", "bands", to="RGB"),
        2,
        "kdpipe.yaml: ingest.student.bands: expected `array`, got `str`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_what_is_given_costs_one_line(project, name):
    make, status, words = MISTAKES[name]
    make(project)
    result = project.kdpipe("run")
    assert words in result.stderr
    assert result.returncode == status
    check_harmless(project, result)
    assert not (project.folder / "manifest.json").exists()


def check_harmless(project, result):
    """At most three lines besides the list of stages, no traceback, nothing half written."""
    words = [line for line in result.stderr.splitlines() if " runs " not in line[:20]]
    words = [line for line in words if " fresh " not in line[:20]]
    assert len(words) <= 3, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(project.root.rglob("*.partial"))


LATER_MISTAKES = {
    "unknown stage": (["run", "--stage", "compil"], 2, "no stage 'compil'; did you mean 'compile'"),
    "unknown option": (["run", "--stag", "compile"], 2, "No such option"),
    "impossible range": (
        ["run", "--from", "compile", "--to", "distill"],
        2,
        "the order is ingest -> distill -> calibrate -> compile -> benchmark",
    ),
    "two ways to select": (["run", "--stage", "compile", "--to", "compile"], 2, "stands alone"),
    "no config": (["run", "-c", "nowhere.yaml"], 2, "nowhere.yaml does not exist; `kdpipe init"),
    "unknown network": (
        ["run", "--set", "distill.student=resnet81"],
        3,
        "timm has no network 'resnet81'; did you mean",
    ),
    "network too big for the input": (
        ["run", "--set", "distill.student=inception_v3"],
        3,
        "inception_v3 does not take 3 channels at 16x16",
    ),
    "weights that leave nothing to learn": (
        ["run", "--set", "distill.hard_weight=0", "--set", "distill.soft_weight=0"],
        3,
        "hard_weight, soft_weight and feature_weight are all 0",
    ),
    "more calibration samples than images": (
        ["run", "--set", "calibrate.samples=500"],
        3,
        "calibrate.samples is 500, but the training split has only 180 different images",
    ),
    "no SDK": (["run", "--set", "compile.backend=voyager"], 5, "Voyager SDK is not installed"),
    "a gate without its word": (["run", "--allow", "int8_loss"], 2, "write gate=NAME"),
    "a gate's name misspelt": (
        ["run", "--allow", "gate=int8los:why"],
        2,
        "there is no gate 'int8los'; did you mean 'int8_loss'?",
    ),
    "a stage whose input is stale": (
        ["run", "--stage", "compile", "--set", "calibrate.samples=31"],
        3,
        "calibrate is stale: samples was 32, now 31.\n  calibrate makes it:  kdpipe run --stage",
    ),
    "why of no stage": (["status", "--why", "distil"], 2, "did you mean 'distill'"),
    "init over a config": (["init", "."], 3, "kdpipe.yaml exists"),
}


@pytest.mark.parametrize("name", LATER_MISTAKES)
def test_a_mistake_after_a_good_run_leaves_its_manifest(finished, name):
    words, status, expected = LATER_MISTAKES[name]
    before = (finished.folder / "manifest.json").read_bytes()
    result = finished.kdpipe(*words)
    assert expected in result.stderr
    assert result.returncode == status
    check_harmless(finished, result)
    assert (finished.folder / "manifest.json").read_bytes() == before
    assert finished.kdpipe("verify").returncode == 0


def test_a_refused_teacher_was_right_before(project):
    """The mistakes above are refused for what they are, not for something they share."""
    for options in ({}, {"batch": 5}, {"opset": 9}, {"external": "w.bin"}, {"size": "H"}):
        teacher(project, **options)
        result = project.kdpipe("run", "--stage", "ingest", "--force")
        assert result.returncode == 0, result.stderr


def test_init_where_nobody_may_write_is_one_line(project, read_only_folder):
    result = project.kdpipe("init", str(read_only_folder / "new"))
    assert result.returncode == 3
    assert "can't write" in result.stderr
    check_harmless(project, result)


def test_a_damaged_manifest_is_named_and_left(finished):
    path = finished.folder / "manifest.json"
    path.write_text(path.read_text()[:-20])
    before = path.read_bytes()
    for words in (["run"], ["status"], ["verify"]):
        result = finished.kdpipe(*words)
        assert result.returncode == 3
        assert "manifest.json is damaged" in result.stderr
        check_harmless(finished, result)
    assert path.read_bytes() == before


def test_debug_shows_where(project):
    (project.root / "preprocessing.json").write_text("{")
    result = project.kdpipe("run", "--debug")
    assert "Traceback" in result.stderr
