"""Sabotage: whatever is changed between training and device, parity says which field it was.

Every sabotage also redoes the digests, so that nothing but parity itself can notice.
"""

import json
import re
import shutil
from subprocess import CompletedProcess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_project import Project, write_project

from pipeline.cli.main import main
from preprocessing.images import read_png, write_png


@pytest.fixture(scope="module")
def _resizing(tmp_path_factory):
    """A finished project whose device resizes, bilinear, images encoded by percentiles."""
    project = write_project(tmp_path_factory.mktemp("resizing") / "project")
    project.edit("ingest", "student", "interpolation", to="bilinear")
    project.edit("ingest", "student", "encoding", to="percentile")
    result = project.kdpipe("run")
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture
def resizing(_resizing, tmp_path):
    shutil.copytree(_resizing.root, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def parity(monkeypatch, capsys):
    """`kdpipe verify --parity` in this process: what it imports would take seconds each time."""

    def verify(project, *words):
        monkeypatch.chdir(project.root)
        monkeypatch.setattr("sys.argv", ["kdpipe", "verify", "--parity", *words])
        monkeypatch.setattr("signal.signal", lambda number, handler: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return CompletedProcess("kdpipe", ended.value.code, *capsys.readouterr())

    return verify


def strict_json(text):
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def shown(values):
    return ", ".join(f"{value:.7g}" for value in values)


def edit_yaml(project, old, new):
    path = project.artifact("device_pipeline") / "tiny.yaml"
    text = path.read_text()
    found = re.search(old, text)
    assert found, text
    path.write_text(text[: found.start()] + found.expand(new) + text[found.end() :])
    project.redo_digest("device_pipeline")


def edit_student_input(project, edit):
    path = project.artifact("student_input")
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    project.redo_digest("student_input")


def image_of(project, number=0):
    folder = project.artifact("device_pipeline") / "tiny-images" / "val"
    return sorted(folder.rglob("*.png"))[number]


@pytest.mark.parametrize("name", ["finished", "resizing"])
def test_an_honest_run_passes_every_leg(request, parity, name):
    project = request.getfixturevalue(name)
    result = parity(project, "--json")
    assert result.returncode == 0, result.stderr
    legs = {leg["name"]: leg for leg in strict_json(result.stdout)["parity"]}
    assert list(legs) == ["png", "yaml", "export", "int8"]
    assert all(leg["passed"] for leg in legs.values())
    assert legs["png"]["values"]["max_abs_difference"] == 0
    assert legs["yaml"]["values"]["max_abs_difference"] <= 1e-5
    assert legs["export"]["values"]["top1_agreement"] == 1.0
    report = strict_json((project.artifact("benchmark_report") / "report.json").read_text())
    assert [row["passed"] for row in report["parity"]] == [True] * 4
    assert {row["n"] for row in report["parity"]} == {60}
    for row, leg in zip(report["parity"], legs.values(), strict=True):
        assert (row["source"], row["target"]) == (leg["source"], leg["target"])


YAML = {
    "channels swapped": (
        r"mean: (\S+), (\S+), (\S+)",
        r"mean: \3, \2, \1",
        "normalize.mean is ",
    ),
    "std of other bands": (
        r"std: (\S+), (\S+), (\S+)",
        r"std: \2, \1, \3",
        "normalize.std is ",
    ),
    "no z-score": (
        r"        - normalize:\n.*\n.*\n",
        "",
        "preprocess is torchtotensor; needed is torchtotensor, normalize",
    ),
    "z-score twice": (
        r"(        - normalize:\n.*\n.*\n)",
        r"\1\1",
        "preprocess is torchtotensor, normalize, normalize",
    ),
    "divided by 255": ("scale: False", "scale: True", "torchtotensor.scale is True"),
    "scale left out": (r":\n            scale: False", ": {}", "torchtotensor.scale is None"),
    "mean in units of 1": (
        r"mean: \S+, \S+, \S+",
        "mean: 0.226, 0.2015, 0.1904",
        "normalize.mean is 0.226",
    ),
    "no mean, no std": (
        r"mean: .*\n(\s+)std: .*\n",
        r"mean: 0, 0, 0\n\1std: 1, 1, 1\n",
        "normalize.mean is 0, 0, 0, needed is ",
    ),
    "BGR": ("color_format: RGB", "color_format: BGR", "input.color_format is BGR"),
    "BGR to the model": (
        "input_color_format: RGB",
        "input_color_format: BGR",
        "input_color_format is BGR",
    ),
    "another size": (r"\[1, 3, 16, 16\]", "[1, 3, 24, 24]", "input_tensor_shape is [1, 3, 24, 24]"),
    "another layout": (
        "input_tensor_layout: NCHW",
        "input_tensor_layout: NHWC",
        "input_tensor_layout is NHWC, needed is NCHW",
    ),
    "two operators in one item": (
        r"False\n        - normalize:",
        "False\n          normalize:",
        "tiny.yaml: not a pipeline with one task",
    ),
    "std of zero": (r"std: \S+,", "std: 0,", "the tensor is not finite"),
    "no YAML": ("pipeline:", "pipeline: [", "tiny.yaml: not a pipeline with one task"),
    "no number": (r"mean: \S+,", "mean: many,", "is not numbers"),
}

RESIZING_YAML = {
    "interpolation": (
        "interpolation: bilinear",
        "interpolation: nearest",
        "resize.interpolation is nearest, needed is bilinear",
    ),
    "half-pixel centres": (
        "half_pixel_centers: True",
        "half_pixel_centers: False",
        "resize.half_pixel_centers is False",
    ),
    "no resize": (r"        - resize:\n(            .*\n)+", "", "preprocess is torchtotensor"),
    "another width": ("width: 16", "width: 18", "resize.width is 18, needed is 16"),
    "no width": ("width: 16", "width: many", "resize can't be done with "),
}


@pytest.mark.parametrize("what", YAML)
def test_a_field_of_the_yaml_that_was_changed_is_named(finished, parity, what):
    old, new, words = YAML[what]
    edit_yaml(finished, old, new)
    result = parity(finished)
    assert result.returncode == 4
    assert result.stderr.startswith("Error: parity, yaml: ")
    assert words in result.stderr
    assert "png     passed" in result.stdout


@pytest.mark.parametrize("what", RESIZING_YAML)
def test_a_field_of_the_resize_that_was_changed_is_named(resizing, parity, what):
    old, new, words = RESIZING_YAML[what]
    edit_yaml(resizing, old, new)
    result = parity(resizing, "--json")
    assert result.returncode == 4
    assert words in result.stderr
    legs = {leg["name"]: leg for leg in strict_json(result.stdout)["parity"]}
    assert [name for name, leg in legs.items() if not leg["passed"]] == ["yaml"]
    # Not the field alone: the tensor is another one too, or none.
    difference = legs["yaml"]["values"]["max_abs_difference"]
    assert difference is None or difference > 0.01


def test_a_yaml_that_is_no_text_is_named(finished, parity):
    path = finished.artifact("device_pipeline") / "tiny.yaml"
    path.write_bytes(path.read_bytes() + b"# \xff\n")
    finished.redo_digest("device_pipeline")
    result = parity(finished)
    assert result.returncode == 4
    assert "parity, yaml: no tensor; tiny.yaml: 'utf-8' codec can't decode" in result.stderr


def benchmark(project):
    """As short as it can be, for the sake of its gate."""
    short = ["--set", "benchmark.min_seconds=0.01", "--set", "benchmark.min_queries=2"]
    return project.kdpipe("run", "--stage", "benchmark", *short)


def test_the_benchmark_stops_at_the_same_gate(finished):
    edit_yaml(finished, "color_format: RGB", "color_format: BGR")
    result = benchmark(finished)
    assert result.returncode == 4
    assert "benchmark: gate parity did not pass: yaml: max abs difference " in result.stderr
    assert "tiny.yaml: input.color_format is BGR, needed is RGB" in result.stderr
    gate = finished.manifest["stages"]["benchmark"]["gate"]
    assert {name: found["passed"] for name, found in gate.items()} == {
        "parity": False,
        "verdict": True,
    }
    report = strict_json((finished.artifact("benchmark_report") / "report.json").read_text())
    assert [row["passed"] for row in report["parity"]] == [True, False, True, True]


@pytest.mark.parametrize("command", [["verify", "--parity"], ["run", "--stage", "benchmark"]])
def test_what_was_edited_by_hand_does_not_come_as_far_as_parity(finished, command):
    path = finished.artifact("device_pipeline") / "tiny.yaml"
    path.write_text(path.read_text().replace("scale: False", "scale: True"))
    result = finished.kdpipe(*command)
    assert result.returncode == 3
    assert "device_pipeline" in result.stderr
    assert "expected " in result.stderr
    assert "torchtotensor.scale" not in result.stdout + result.stderr


def change_a_level(image):
    changed = image.copy()
    changed[1, 2, 0] ^= 1
    return changed


IMAGES = {
    "one grey level of one pixel": change_a_level,
    "red and blue swapped": lambda image: image[..., ::-1],
    "mirrored": lambda image: image[:, ::-1],
    "truncated levels": lambda image: image - (image > 0),
}


@pytest.mark.parametrize("what", IMAGES)
def test_an_exported_image_that_was_changed_is_found(finished, parity, what):
    path = image_of(finished, 7)
    write_png(np.ascontiguousarray(IMAGES[what](read_png(path))), path)
    finished.redo_digest("device_pipeline")
    result = parity(finished, "--json")
    assert result.returncode == 4
    legs = {leg["name"]: leg for leg in strict_json(result.stdout)["parity"]}
    std = json.loads(finished.artifact("student_input").read_text())["std"]
    for name in ("png", "yaml"):
        difference = legs[name]["values"]["max_abs_difference"]
        # A grey level of the first channel, or more; and said with the name of its leg.
        assert difference >= 0.99 / std[0]
        assert f"parity, {name}: max abs difference {difference:.3g}" in result.stderr


BROKEN = {
    "another size": (
        lambda path: write_png(np.ascontiguousarray(read_png(path)[::4, ::4]), path),
        "is uint8 (4, 4, 3), needed is uint8 (16, 16, 3)",
    ),
    "gray": (
        lambda path: write_png(read_png(path)[..., :1], path),
        "is uint8 (16, 16, 1), needed is uint8 (16, 16, 3)",
    ),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:60]), "is not a readable image"),
    "gone": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_image_that_gives_no_tensor_is_named(finished, parity, what):
    break_, words = BROKEN[what]
    path = image_of(finished, 7)
    break_(path)
    finished.redo_digest("device_pipeline")
    result = parity(finished, "--json")
    assert result.returncode == 4
    name = path.relative_to(finished.artifact("device_pipeline") / "tiny-images").as_posix()
    assert f"parity, png: no tensor; {name} {words}" in result.stderr
    assert strict_json(result.stdout)["parity"][0]["values"]["max_abs_difference"] is None


def test_images_of_another_size_leave_a_manifest_that_can_be_read(finished):
    for path in (finished.artifact("device_pipeline") / "tiny-images" / "val").rglob("*.png"):
        write_png(np.ascontiguousarray(read_png(path)[::2, ::2]), path)
    finished.redo_digest("device_pipeline")
    result = benchmark(finished)
    assert result.returncode == 4
    assert "gate parity did not pass: png: no tensor; val/0_water/row" in result.stderr
    strict_json((finished.folder / "manifest.json").read_text())
    assert finished.kdpipe("status").returncode == 0


def test_class_folders_that_changed_places_are_found(finished, parity):
    folder = finished.artifact("device_pipeline") / "tiny-images" / "val"
    (folder / "0_water").rename(folder / "x")
    (folder / "1_forest").rename(folder / "0_water")
    (folder / "x").rename(folder / "1_forest")
    finished.redo_digest("device_pipeline")
    result = parity(finished)
    assert result.returncode == 4
    assert re.search(r"parity, png: no tensor; val/\d_\w+/row\d+\.png is missing", result.stderr)


def test_a_dataset_whose_channels_changed_places_is_not_what_was_exported(finished, parity):
    path = finished.artifact("dataset") / "val" / "images.npy"
    np.save(path, np.load(path)[..., ::-1].copy())
    finished.redo_digest("dataset")
    result = parity(finished)
    assert result.returncode == 4
    assert "parity, png: max abs difference" in result.stderr
    assert "parity, yaml: max abs difference" in result.stderr


def test_images_of_two_patches_that_changed_places_are_found(finished, parity):
    one, other = image_of(finished, 0), image_of(finished, 40)
    images = read_png(one), read_png(other)
    write_png(images[1], one)
    write_png(images[0], other)
    finished.redo_digest("device_pipeline")
    result = parity(finished)
    assert result.returncode == 4
    assert "parity, png: max abs difference" in result.stderr


STUDENT_INPUT = {
    "order of the bands": (
        {"bands": [0, 1, 2]},
        r"parity, png: max abs difference \S+; student_input\.json: mean is .* preprocessing\.json "
        r"gives .* for bands 0, 1, 2 of optical",
    ),
    "another band": (
        {"bands": [2, 1, 3]},
        r"parity, png: .*student_input\.json: std is .* for bands 2, 1, 3 of optical",
    ),
    "a band that is not there": ({"bands": [2, 1, 4]}, r"Error: band 4 does not exist: modality"),
    "grey levels": (
        {"grey_hi": [255.0, 255.0, 250.0]},
        r"student_input\.json: grey_hi is 255, 255, 250, preprocessing\.json gives 255, 255, 255",
    ),
    "z-score": (
        {"mean": [0.0] * 3, "std": [1.0] * 3},
        r"parity, png: .*student_input\.json: mean is 0, 0, 0, preprocessing\.json gives .*"
        r"parity, yaml: .*tiny\.yaml: normalize\.mean is \S+, \S+, \S+, needed is 0, 0, 0",
    ),
    "interpolation": (
        {"interpolation": "bilinear", "half_pixel_centers": True},
        r"parity, png: max abs difference \d\S+; parity, yaml: max abs difference \d",
    ),
    "device_resize": (
        {"device_resize": True},
        r"parity, png: no tensor; val/0_water/row\d+\.png is uint8 \(16, 16, 3\), needed is uint8 "
        r"\(4, 4, 3\)",
    ),
}


@pytest.mark.parametrize("what", STUDENT_INPUT)
def test_a_field_of_the_students_input_that_was_changed_is_named(finished, parity, what):
    fields, words = STUDENT_INPUT[what]
    edit_student_input(finished, lambda tree: tree.update(fields))
    result = parity(finished)
    assert result.returncode == (3 if "not there" in what else 4)
    assert re.search(words, result.stderr), result.stderr


def test_ends_of_the_encoding_that_were_changed_are_named(resizing, parity):
    before = json.loads(resizing.artifact("student_input").read_text())
    edit_student_input(resizing, lambda tree: tree["grey_lo"].__setitem__(1, 0.0))
    assert before["grey_lo"][1] != 0
    result = parity(resizing)
    assert result.returncode == 4
    words = f"student_input.json: mean is {shown(before['mean'])}, preprocessing.json gives "
    assert words in result.stderr
    assert "parity, png: max abs difference" in result.stderr
    assert "parity, yaml" not in result.stderr


@pytest.mark.parametrize("key", ["calibrate.max_int8_loss", "benchmark.max_int8_loss"])
def test_the_limit_is_that_of_the_config(finished, parity, key):
    result = parity(finished, "--set", f"{key}=0.5")
    assert result.returncode == 4
    assert "Error: parity, int8: loss " in result.stderr
    assert "limit 0.5 points" in result.stdout


def test_any_byte_of_the_contract_is_found(finished, parity):
    original = (finished.root / "preprocessing.json").read_bytes()
    copies = [finished.root / "preprocessing.json", finished.artifact("contract")]
    for path in copies:
        for position in (0, len(original) // 2, len(original) - 2):
            edited = bytearray(original)
            edited[position] ^= 1
            path.write_bytes(bytes(edited))
            for command in (["verify", "--parity"], ["run", "--stage", "benchmark"]):
                result = finished.kdpipe(*command)
                assert result.returncode == 3
                assert "contract" in result.stderr or "preprocessing.json" in result.stderr
                assert "parity," not in result.stderr
        path.write_bytes(original)
    assert parity(finished).returncode == 0


def test_a_digit_of_the_runs_contract_is_found_even_if_its_digest_was_redone(finished, parity):
    path = finished.artifact("contract")
    truth = finished.manifest["contract"]["sha256"]
    tree = json.loads(path.read_text())
    tree["scaling"]["optical"]["src_range"][0] = 0.1
    path.write_text(json.dumps(tree))
    finished.redo_digest("contract")
    changed = finished.manifest["artifacts"]["contract"]["sha256"]
    assert changed != truth
    result = parity(finished)
    assert result.returncode == 3
    assert f"preprocessing.json: expected {truth}, found {changed}" in result.stderr


def test_weights_that_are_not_the_exported_ones_are_found(finished, parity):
    path = finished.artifact("training") / "student.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("weight"))
    weights[name] = weights[name] * 1.5
    save_file(weights, path)
    finished.redo_digest("training")
    result = parity(finished)
    assert result.returncode == 4
    assert "parity, export: max abs logit difference" in result.stderr


def test_before_there_is_something_to_compare_the_stage_is_named(project, parity):
    project.kdpipe("run", "--to", "ingest")
    result = parity(project)
    assert result.returncode == 3
    assert "parity needs 'student'" in result.stderr
    assert "kdpipe run --to distill" in result.stderr
