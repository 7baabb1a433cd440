import hashlib
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.calibration.samples import choose_samples
from pipeline.data.dataset import DatasetSplit
from pipeline.params.calibrate import CalibrateParams
from pipeline.run.errors import InputError
from pipeline.stages.calibrate import gates


def split(counts, duplicates=0):
    labels = np.concatenate([np.full(n, i) for i, n in enumerate(counts)])
    images = np.arange(1, len(labels) + 1).repeat(12).reshape(-1, 2, 2, 3).astype(np.uint8)
    images[:, 0, 0, 0] ^= 0x80
    images[:duplicates] = images[0]
    return DatasetSplit(images=images, labels=labels, rows=np.arange(len(labels)))


def test_every_class_has_its_share_in_a_fixed_order():
    train = split([100, 60, 40])
    chosen = choose_samples(train, 20, 3, seed=0).indices
    assert np.bincount(train.labels[chosen]).tolist() == [10, 6, 4]
    assert len(set(chosen.tolist())) == 20
    assert np.array_equal(chosen, choose_samples(train, 20, 3, seed=0).indices)
    assert not np.array_equal(chosen, choose_samples(train, 20, 3, seed=1).indices)
    assert not np.array_equal(chosen, np.sort(chosen))


def test_a_rare_class_is_there_too_and_few_samples_are_few():
    train = split([180, 2, 0, 18])
    chosen = choose_samples(train, 20, 4, seed=0).indices
    histogram = np.bincount(train.labels[chosen], minlength=4)
    assert histogram.sum() == 20
    assert histogram[1] >= 1
    assert histogram[2] == 0
    assert len(choose_samples(train, 2, 4, seed=0).indices) == 2


def test_a_patch_of_one_color_is_left_out_by_name():
    train = split([30, 30])
    train.images[[4, 7]] = (9, 8, 7)
    choice = choose_samples(train, 50, 2, seed=0)
    assert not {4, 7} & set(choice.indices.tolist())
    (words,) = choice.warnings()
    assert words.startswith("2 training patches are one color all over")
    assert words.endswith("rows 4, 7")


def test_patches_cut_by_the_encoding_and_patches_of_other_splits_are_left_out_by_name():
    train = split([30, 30])
    unfit = {"elsewhere": [40, *range(3, 15)], "outside": [5, 20]}
    choice = choose_samples(train, 40, 2, seed=0, unfit=unfit)
    assert not {40, 20, *range(3, 15)} & set(choice.indices.tolist())
    leaked, cut = choice.warnings()
    assert leaked.startswith("12 training patches are in val or test too and were not taken for")
    assert leaked.endswith("rows 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, ...")
    assert "2 training patches lie mostly outside the encoding's range" in cut
    assert cut.endswith("rows 5, 20")
    with pytest.raises(InputError, match=r"only 46 .* \(12 are in val or test too, 2 lie mostly"):
        choose_samples(train, 47, 2, seed=0, unfit=unfit)


def test_no_image_is_taken_twice():
    train = split([30, 30], duplicates=11)
    chosen = choose_samples(train, 50, 2, seed=0).indices
    contents = {train.images[i].tobytes() for i in chosen}
    assert len(contents) == 50
    (words,) = choose_samples(train, 50, 2, seed=0).warnings()
    assert words.startswith("10 training patches repeat another and were not taken")
    with pytest.raises(
        InputError, match=r"calibrate.samples is 51, but .* only 50 different images .*10 repeat"
    ):
        choose_samples(train, 51, 2, seed=0)


@pytest.mark.parametrize(
    ("loss", "interval", "verdict"),
    [
        (0.2, [-0.3, 0.9], "passed"),
        (0.2, [-0.8, 1.2], "undecided"),
        (2.0, [0.5, 3.5], "undecided"),
        (2.0, [1.1, 2.9], "failed"),
        (-0.5, [-1.0, 0.0], "passed"),
    ],
)
def test_the_gate_wants_the_whole_interval_below_the_limit(loss, interval, verdict):
    facts = {"int8_loss_points": loss, "int8_loss_interval95_points": interval, "n_val": 500}
    (gate,) = gates(CalibrateParams(), SimpleNamespace(**facts))
    assert gate.message.startswith(f"{verdict}: int8 loses")
    assert gate.passed == (verdict == "passed")


def test_the_record_says_which_samples_calibrated(finished):
    facts = finished.manifest["stages"]["calibrate"]["facts"]
    assert facts["calibration"]["samples"] == 32
    assert facts["calibration"]["split"] == "train"
    assert sum(facts["calibration"]["classes"]) == 32
    folder = finished.artifact("calibration_set")
    samples = np.load(folder / "samples.npy")
    assert samples.shape == (32, 1, 3, 16, 16)
    assert hashlib.sha256(samples.tobytes()).hexdigest() == facts["calibration"]["sha256"]
    rows = json.loads((folder / "samples.json").read_text())["rows"]
    train = DatasetSplit.load(finished.artifact("dataset") / "train")
    assert set(rows) <= set(train.rows.tolist())


def test_a_loss_beyond_the_limit_ends_with_4_and_keeps_the_model(finished):
    result = finished.kdpipe("run", "--set", "calibrate.max_int8_loss=0.0001")
    assert result.returncode == 4
    assert "calibrate: gate int8_loss did not pass: " in result.stderr
    assert finished.artifact("quantized_model").exists()
    assert not finished.manifest["stages"]["calibrate"]["gate"]["int8_loss"]["passed"]
    allowed = finished.kdpipe(
        "run", "--set", "calibrate.max_int8_loss=0.0001", "--allow", "gate=int8_loss:a test"
    )
    assert allowed.returncode == 0
    gate = finished.manifest["stages"]["calibrate"]["gate"]["int8_loss"]
    assert gate["allowed"].endswith("a test")


def rerun(project, *words):
    return project.kdpipe("run", "--stage", "calibrate", *words)


def calibrated(project):
    return project.manifest["stages"]["calibrate"]["facts"]


def test_the_record_shows_the_other_ways_the_worst_layers_and_what_to_try(finished):
    facts = calibrated(finished)
    rows = {row["name"]: row for row in facts["variants"]}
    assert set(rows) == {
        "as configured",
        "scheme per_tensor_min_max",
        "scheme hybrid_per_tensor_per_channel",
        "without bias correction",
    }
    used = rows["as configured"]
    assert used["top1"] == facts["top1_val_int8"]
    assert used["sqnr_db"] == pytest.approx(facts["logits_sqnr_db"])
    assert len({row["sqnr_db"] for row in rows.values()}) >= 3
    assert {row["measured_on"] for row in rows.values()} == {"host-emulation"}
    worst = [row["sqnr_db"] for row in facts["worst_layers"]]
    assert worst == sorted(worst)
    assert worst[0] > facts["logits_sqnr_db"]  # one layer alone loses less than all together
    assert "calibrate.samples: 32 are few; 100 to 400 are usual" in facts["suggestions"]
    assert "int8 kernels" in facts["arithmetic"]


def test_the_baked_student_is_what_the_backend_quantized(finished):
    """Its weights lie on the grid already, so its own rounding to int8 is exact."""
    student = onnx.load(finished.artifact("baked_student"))
    assert student.opset_import[0].version == 17
    assert student.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    weights = {i.name: numpy_helper.to_array(i) for i in student.graph.initializer}
    for node in student.graph.node:
        if node.op_type == "Conv":
            rows = weights[node.input[1]].reshape(len(weights[node.input[1]]), -1)
            codes = rows / (np.abs(rows).max(axis=1, keepdims=True) / 127)
            assert np.allclose(codes, np.rint(codes), atol=1e-3)


def test_ranges_can_be_edited_and_used_again(finished):
    before = finished.artifact("ranges").read_text()
    raw = json.loads(before)
    name = next(iter(raw["tensors"]))
    raw["tensors"][name]["hi"] *= 0.02
    (finished.root / "mine.json").write_text(json.dumps(raw))
    finished.edit("calibrate", "ranges_file", to="mine.json")
    sqnr = calibrated(finished)["logits_sqnr_db"]
    assert rerun(finished, "--allow", "gate=int8_loss:test").returncode == 0
    assert finished.artifact("ranges").read_text() == json.dumps(raw, indent=1) + "\n"
    worse = calibrated(finished)["logits_sqnr_db"]
    assert worse < sqnr - 3
    # Rows of the same scheme have the given ranges too; the others choose their own.
    rows = {row["name"]: row["sqnr_db"] for row in calibrated(finished)["variants"]}
    assert rows["as configured"] == pytest.approx(worse)
    assert rows["without bias correction"] < sqnr - 3
    assert rows["scheme per_tensor_min_max"] > sqnr - 3
    assert rerun(finished, "--allow", "gate=int8_loss:test").stderr.startswith("calibrate  fresh")

    del raw["tensors"][name]
    (finished.root / "mine.json").write_text(json.dumps(raw))
    refused = rerun(finished)
    assert refused.returncode == 3
    assert f"calibrate.ranges_file: no range for tensor {name!r}" in refused.stderr
    refused = rerun(finished, "--set", "calibrate.observer=mse")
    assert refused.returncode == 3
    assert "calibrate.ranges and calibrate.observer change nothing" in refused.stderr
    refused = finished.kdpipe("curve", "--sizes", "4")
    assert refused.returncode == 3
    assert "--set calibrate.ranges_file=null" in refused.stderr
    leave_out = ("--set", "calibrate.ranges_file=null")
    assert finished.kdpipe("curve", "--sizes", "4", *leave_out).returncode == 0


def test_a_tensor_may_have_another_observer_or_a_given_range(finished):
    finished.edit("calibrate", "ranges", to={"*": "percentile", "input": [-2.0, 2.5]})
    finished.edit("calibrate", "sensitivity", to=0)
    assert rerun(finished, "--allow", "gate=int8_loss:test").returncode == 0
    tensors = json.loads(finished.artifact("ranges").read_text())["tensors"]
    assert tensors["input"]["observer"] == "given"
    assert (tensors["input"]["lo"], tensors["input"]["hi"]) == (-2.0, 2.5)
    assert {t["observer"] for n, t in tensors.items() if n != "input"} == {"percentile"}
    assert "worst_layers" not in calibrated(finished)

    finished.edit("calibrate", "ranges", to={"nowhere": "mse"})
    refused = rerun(finished)
    assert refused.returncode == 3
    assert "calibrate.ranges: 'nowhere' fits no tensor of the student" in refused.stderr


@pytest.mark.slow
def test_of_several_schemes_the_record_describes_the_one_that_was_chosen(finished):
    finished.edit("calibrate", "sensitivity", to=4)
    words = ("--set", "compile.try_schemes=all", "--allow", "gate=int8_loss:test")
    assert rerun(finished, *words).returncode == 0
    facts = calibrated(finished)
    tried = {row["scheme"]: row for row in facts["schemes"]}
    rows = {
        row["scheme"]: row for row in facts["variants"] if row["name"] != "without bias correction"
    }
    assert facts["variants"][0]["scheme"] == facts["scheme"]
    for scheme, row in tried.items():
        assert row["logits_sqnr_db"] == pytest.approx(rows[scheme]["sqnr_db"])
    best = max(tried.values(), key=lambda r: (r["top1_val_int8"], r["logits_sqnr_db"]))
    assert best["scheme"] == facts["scheme"]
    observers = json.loads(finished.artifact("ranges").read_text())["tensors"].values()
    word = "min_max" if facts["scheme"] == "per_tensor_min_max" else "mse"
    assert {tensor["observer"] for tensor in observers} == {word}


def test_options_show_what_they_gain(finished):
    finished.edit("calibrate", "equalization", to=True)
    finished.edit("calibrate", "weight_clipping", to=True)
    assert rerun(finished, "--allow", "gate=int8_loss:test").returncode == 0
    names = {row["name"] for row in calibrated(finished)["variants"]}
    assert {"without equalization", "without weight clipping"} <= names


def test_the_curve_of_sample_sizes_writes_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")}
    found = finished.kdpipe("curve", "--sizes", "4,32,16", "--json")
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout)["curve"]
    assert [row["samples"] for row in rows] == [4, 16, 32]
    assert rows[-1]["sqnr_db"] == pytest.approx(calibrated(finished)["logits_sqnr_db"], abs=0.01)
    assert rows[0]["sqnr_db"] != rows[-1]["sqnr_db"]
    assert {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")} == before
    assert "host-emulation" in finished.kdpipe("curve", "--sizes", "4").stdout
    assert finished.kdpipe("curve", "--sizes", "many").returncode == 2
    too_many = finished.kdpipe("curve", "--sizes", "2000")
    assert too_many.returncode == 3
    assert "--sizes is 2000, but the training split has only" in too_many.stderr


def test_the_hybrid_scheme_goes_all_the_way(finished):
    """Its arithmetic is a float simulation, in the bundle too."""
    finished.edit("calibrate", "scheme", to="hybrid_per_tensor_per_channel")
    finished.edit("calibrate", "sensitivity", to=0)
    ran = finished.kdpipe("run", "--allow", "gate=int8_loss:test")
    assert ran.returncode == 0, ran.stderr
    assert "float simulation" in calibrated(finished)["arithmetic"]
    index = json.loads((finished.artifact("bundle") / "bundle.json").read_text())
    assert index["session"] == {"session.disable_quant_qdq": "1"}
    report = json.loads((finished.artifact("benchmark_report") / "report.json").read_text())
    assert report["int8"]["scheme"] == "hybrid_per_tensor_per_channel"
    assert any("hybrid with 32 samples" in words for words in report["int8"]["suggestions"])
