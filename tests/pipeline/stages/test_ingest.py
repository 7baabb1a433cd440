import json

import numpy as np
import onnxruntime as ort
import pytest
from tiny_project import TEACHER_ROUNDING, make_teacher

from pipeline.data.dataset import DatasetSplit
from pipeline.teachers.soft_targets import SoftTargets
from preprocessing.apply import encode, teacher_tensor
from preprocessing.contract import load_contract
from preprocessing.student_input import StudentInput


def facts(project):
    return project.manifest["stages"]["ingest"]["facts"]


def test_cached_logits_are_the_ensembles_on_each_training_sample(finished):
    contract = load_contract(finished.root / "preprocessing.json")
    train = DatasetSplit.load(finished.artifact("dataset") / "train")
    teaching = SoftTargets(finished.artifact("teaching"), finished.artifact("contract"))
    cached = teaching.outputs("train", np.arange(len(train.labels)), 0).logits
    assert cached.shape == (len(train.labels), 3)
    patches = np.load(finished.root / "train.npz")["images"]
    direct = []
    for name, bands in (("dense_a", (0, 1, 2)), ("dense_b", (3, 2, 1))):
        session = ort.InferenceSession(str(finished.root / "teachers" / f"{name}.onnx"))
        tensor = teacher_tensor(
            patches[train.rows][..., list(bands)],
            contract.bind("optical", bands, 4),
            (16, 16),
        )
        direct.append([session.run(None, {"input": row[None]})[0][0] for row in tensor])
    order = np.random.default_rng(0).permutation(len(cached))
    assert cached[order] == pytest.approx(np.mean(direct, axis=0)[order], abs=TEACHER_ROUNDING)


def test_stored_images_are_the_encoded_patches_of_their_rows(finished):
    contract = load_contract(finished.artifact("contract"))
    given = StudentInput.load(finished.artifact("student_input"))
    dataset, test_set = finished.artifact("dataset"), finished.artifact("test_set")
    for folder, file in (
        (dataset / "train", "train.npz"),
        (dataset / "val", "train.npz"),
        (test_set, "test.npz"),
    ):
        split = DatasetSplit.load(folder)
        with np.load(finished.root / file) as archive:
            picked = archive["images"][split.rows][..., list(given.bands)]
            encoded = encode(picked, contract.bind("optical", given.bands, 4), given)
            assert np.array_equal(split.images, encoded)
            assert np.array_equal(split.labels, archive["labels"][split.rows])


def test_the_test_split_is_used_by_no_stage_but_the_benchmark(finished):
    """Other test patches change what is measured, and nothing that is made."""
    finished.kdpipe("run")
    before = finished.manifest["artifacts"]
    with np.load(finished.root / "test.npz") as archive:
        np.savez(
            finished.root / "test.npz",
            images=archive["images"][::-1] * 0.5,
            labels=archive["labels"],
        )
    result = finished.kdpipe("run")
    assert result.returncode == 0
    ran = [line.split()[0] for line in result.stderr.splitlines() if " runs " in line]
    assert ran == ["ingest", "benchmark"]
    after = finished.manifest["artifacts"]
    changed = {name for name in before if after[name]["sha256"] != before[name]["sha256"]}
    assert changed == {"test_set", "bundle", "benchmark_report"}


def test_training_patches_that_must_not_calibrate_are_listed(project):
    """Those that are in val or test too, all of them, and those that the encoding cuts."""
    with np.load(project.root / "train.npz") as archive, np.load(project.root / "test.npz") as test:
        images, labels = archive["images"].copy(), archive["labels"]
        images[:20] = test["images"][:20]
        images[30, 1:] = 3.5  # the contract's range ends at 2.8
        images[33] = np.where(images[33] < 0.5, 0, 2.8)  # at the ends, where nothing is cut
        np.savez(project.root / "train.npz", images=images, labels=labels)
    assert project.kdpipe("run", "--stage", "ingest").returncode == 0
    found = json.loads(project.artifact("unfit").read_text())
    rows = DatasetSplit.load(project.artifact("dataset") / "train").rows.tolist()
    assert found["elsewhere"] == [row for row in rows if row < 20]
    assert len(found["elsewhere"]) > 5  # more than ingest's warning names
    assert found["outside"] == [30] * (30 in rows)
    assert {30, 33} <= set(rows)


def test_the_facts_describe_members_ensemble_and_data(finished):
    found = facts(finished)
    assert [m["name"] for m in found["teachers"]["members"]] == ["dense_a", "dense_b"]
    assert [m["batch"] for m in found["teachers"]["members"]] == [None, 1]
    assert found["teachers"]["top1_val"] > 0.95
    assert found["splits"]["train"] == {
        "patches": 180,
        "classes": [60, 60, 60],
        "bad_patches_dropped": 0,
    }
    assert found["splits"]["val"]["patches"] == 60
    band = found["bands"][2]
    assert band["mu_contract"] == pytest.approx(band["mu_data"], rel=0.05)


def test_a_pattern_finds_all_its_teachers_in_order(project):
    for name in ("dense_d", "dense_c"):
        make_teacher(project.root / "teachers" / f"{name}.onnx", (0, 1, 2), project.contract)
    (project.root / "teachers" / "dense_b.onnx").unlink()
    project.edit("ingest", "teachers", to=[{"path": "teachers/dense_*.onnx", "bands": [0, 1, 2]}])
    assert project.kdpipe("run", "--stage", "ingest").returncode == 0
    names = [m["name"] for m in facts(project)["teachers"]["members"]]
    assert names == ["dense_a", "dense_c", "dense_d"]
    (project.root / "teachers" / "dense_d.onnx").unlink()
    assert project.states()["ingest"] == "stale"


@pytest.mark.parametrize(
    ("softmax", "output", "words"),
    [
        (True, "softmax cut off", "ends in a softmax: the tensor before it is taken as logits"),
        ("hidden", "probabilities", "gives probabilities: their logarithm is taken as logits"),
    ],
)
def test_weights_count_and_probabilities_are_taken_as_such(project, softmax, output, words):
    path = project.root / "teachers" / "dense_b.onnx"
    make_teacher(path, (3, 2, 1), project.contract, softmax=softmax)
    project.edit("ingest", "teachers", 0, "weight", to=3.0)
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0
    assert f"warning  dense_b {words}" in result.stderr
    members = facts(project)["teachers"]["members"]
    assert [m["output"] for m in members] == ["logits", output]
    assert [m["weight"] for m in members] == [3.0, 1.0]
    assert project.manifest["stages"]["ingest"]["warnings"]


def test_external_weights_are_watched(project):
    path = project.root / "teachers" / "dense_a.onnx"
    make_teacher(path, (0, 1, 2), project.contract, external="w.bin")
    assert project.kdpipe("run", "--stage", "ingest").returncode == 0
    sources = project.manifest["stages"]["ingest"]["sources"]
    assert sources["teachers[0]+w.bin"]["path"] == "teachers/w.bin"
    weights = path.with_name("w.bin")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert project.states()["ingest"] == "stale"


def test_statistics_that_fit_loosely_are_a_warning(project):
    mu = project.contract["zscore"]["mu"]
    project.edit_contract("zscore", "mu", to=[v * 1.12 for v in mu])
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0
    assert "preprocessing.json fits the training data loosely: optical band" in result.stderr


def test_extra_keys_of_the_contract_are_carried(finished):
    assert json.loads(finished.artifact("contract").read_text())["exporter"] == {"an": "extra key"}
