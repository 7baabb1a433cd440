import os
import re
from pathlib import Path

import pytest
import yaml

from pipeline.run.config import load_config
from pipeline.run.errors import ConfigError, nearest
from pipeline.stages import load_stages

STAGES = load_stages()
MINIMAL = """
ingest:
  data: {train: {path: a.npz}, test: {path: b.npz}}
  teachers: [{path: t.onnx, bands: [0]}]
  student: {bands: [0]}
"""


def load(tmp_path, text, **options):
    path = tmp_path / "kdpipe.yaml"
    path.write_text(text)
    return load_config(path, STAGES, **options)


def test_a_missing_line_means_the_default(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert config.run == "default"
    assert config.seed == 0
    assert config.params["distill"].hard_weight == 0.7
    assert config.params["distill"].soft_weight == 0.3
    assert config.params["distill"].temperature == 2.0
    assert config.params["calibrate"].samples == 200
    assert config.folder == tmp_path / "runs" / "default"


def test_the_template_holds_every_key_and_says_the_truth_about_defaults(tmp_path):
    from importlib.resources import files

    text = files("pipeline").joinpath("templates/kdpipe.yaml").read_text()
    template = load(tmp_path, text)
    defaults = load(tmp_path, MINIMAL)
    tree = yaml.safe_load(text)
    for stage in ("distill", "calibrate", "compile", "benchmark"):
        assert template.params[stage] == defaults.params[stage]
        assert set(tree[stage]) == set(template.params[stage].__struct_fields__)
    ingest = template.params["ingest"]
    assert set(tree["ingest"]) == set(ingest.__struct_fields__)
    assert set(tree["ingest"]["student"]) == set(ingest.student.__struct_fields__)
    assert set(tree["ingest"]["teachers"][0]) == set(ingest.teachers[0].__struct_fields__)
    assert set(tree["ingest"]["data"]) == set(ingest.data.__struct_fields__)
    assert ingest.max_mean_shift == defaults.params["ingest"].max_mean_shift
    for name in ("bad_patches", "on_leak", "cache", "format"):
        assert getattr(ingest.data, name) == getattr(defaults.params["ingest"].data, name)
    for name in ("half_pixel_centers", "device_resize", "encoding", "percentiles", "interpolation"):
        assert getattr(ingest.student, name) == getattr(defaults.params["ingest"].student, name)


def test_the_interpreter_of_the_sdk_is_relative_to_the_config_and_told_to_everybody(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("KDPIPE_SDK_PYTHON", "/from/the/shell")

    def pythons(text, **options):
        params = load(tmp_path, MINIMAL + text, **options).params
        assert os.environ["KDPIPE_SDK_PYTHON"] == "/from/the/shell"
        return [params[stage].sdk.python for stage in ("calibrate", "compile", "benchmark")]

    assert pythons("") == ["", "", ""]
    assert pythons("compile: {sdk_python: sdk/bin/python}") == 3 * [
        str(tmp_path / "sdk/bin/python")
    ]
    assert pythons("", changes=["compile.sdk_python=/opt/python"]) == 3 * ["/opt/python"]
    assert pythons("calibrate: {sdk_python: ~/python}")[0] == str(Path("~/python").expanduser())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distil: {}", r"unknown key 'distil'; did you mean 'distill'\?"),
        ("distill: {epoch: 3}", r"unknown key 'distill\.epoch'; did you mean 'epochs'\?"),
        ("ingest: {teachers: [{pth: x}]}", r"unknown key 'ingest\.teachers\[0\]\.pth'.*'path'"),
        ("ingest: {data: {train: {row: 1}}}", r"'ingest\.data\.train\.row'; did you mean 'rows'"),
        (
            "ingest: {student: {bands: [0], percentile: 3}}",
            r"unknown key 'ingest\.student\.percentile'; did you mean 'percentiles'",
        ),
        (
            "distill: {features: [{student: a, techer: b}]}",
            r"'distill\.features\[0\]\.techer'; .*'t",
        ),
        ("distill: {quantization_aware: {shere: 1}}", r"'distill\.quantization_aware\.shere'.*'sh"),
        ("distill: {1: 2}", r"distill: expected `str`"),
        ("distill: 3", r"distill: expected `object`, got `int`"),
        (
            "distill: {baselines: [no_teachr]}",
            r"baselines\[0\]: invalid .*did you mean 'no_teacher",
        ),
        (
            "calibrate: {ranges: {a: mse, b: mze}}",
            r"ranges\.b: invalid .*'mze'; did you mean 'mse'",
        ),
        (
            "distill: {loss: dk}",
            r"distill\.loss\.name: invalid .*'dk'; did you mean 'dkd'",
        ),
        ("distill: {loss: {name: no}}", r"distill\.loss\.name: expected `str`, got `bool`"),
        ("distill: {loss: {target_weight: 1}}", r"distill\.loss: object missing .*`name`"),
        ("distill: {loss: 3}", r"distill\.loss: expected `object`, got `int`"),
        (
            "distill: {loss: {name: dkd, intra_weight: 1}}",
            r"unknown key 'distill\.loss\.intra_weight'; did you mean 'target_weight' or 'nontar",
        ),
        (
            "distill: {loss: {name: dkd, target_wait: 1}}",
            r"unknown key 'distill\.loss\.target_wait'; did you mean 'target_weight'",
        ),
        (
            "distill: {loss: {name: dist, intra_weight: -1}}",
            r"distill\.loss\.intra_weight: expected `float` >= 0",
        ),
        ("distill: {loss: dkd, target_weight: -1}", r"loss\.target_weight: expected `float` >= 0"),
        (
            "distill: {nontarget_weight: 2}",
            r"distill\.nontarget_weight is for loss dkd only: write loss: \{name: dkd, nontarget",
        ),
        (
            "distill: {loss: {name: dkd, target_weight: 2}, target_weight: 3}",
            r"distill\.target_weight is in distill\.loss too",
        ),
        ("distill: {epochs: many}", r"distill\.epochs: expected `int`, got `str`"),
        ("distill: {epochs: 0}", r"distill\.epochs: expected `int` >= 1"),
        ("distill: {temperature: 0}", r"distill\.temperature: expected `float` > 0"),
        ("distill: {hard_weight: -1}", r"distill\.hard_weight: expected `float` >= 0"),
        ("compile: {aipu_cores: 5}", r"compile\.aipu_cores: expected `int` <= 4"),
        (
            "compile: {backend: voyageur}",
            r"compile\.backend: invalid enum value 'voyageur'; did you mean 'voyager'\?",
        ),
        (
            "ingest: {teachers: [{bands: [0], zscore: no}]}",
            r"ingest\.teachers\[0\]\.zscore: expected `str`, got `bool`",
        ),
        (
            "ingest: {teachers: [{bands: [0], zscore: grap}]}",
            r"ingest\.teachers\[0\]\.zscore: invalid enum value 'grap'; did you mean 'graph'\?",
        ),
        ("seed: -1", r"seed: expected `int` >= 0"),
        ("calibrate: {samples: 3000}", r"calibrate\.samples: expected `int` <= 2000"),
        ("seed: soon", r"seed: expected `int`, got `str`"),
        ("run: a/b", r"run is 'a/b'; a run's name has letters"),
        ("run: 1: 2", r"is not YAML"),
        ("- a", r"must be a mapping of sections"),
        ("seed: 1\nseed: 2", r"key 'seed' appears twice \(line 7\)"),
        ("ingest: {}", r"ingest: object missing required field `data`"),
    ],
)
def test_wrong_words_are_refused_by_file_and_key(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        load(tmp_path, text if "ingest" in text or "- a" in text else MINIMAL + text)
    assert "kdpipe.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "section",
    [
        "{loss: {name: dkd, nontarget_weight: 4}}",
        "{loss: dkd, nontarget_weight: 4}",
        "{loss: dkd, nontarget_weight: 4, intra_weight: 1.0, target_weight: 1}",  # the defaults
    ],
)
def test_a_loss_has_weights_of_its_own_and_may_have_them_beside_it_as_before(tmp_path, section):
    loss = load(tmp_path, f"{MINIMAL}distill: {section}").params["distill"].loss
    assert (loss.name, loss.weights) == ("dkd", {"target_weight": 1.0, "nontarget_weight": 4.0})
    changes = ["distill.loss=dkd", "distill.nontarget_weight=4"]
    assert load(tmp_path, MINIMAL, changes=changes).params["distill"].loss == loss


def test_the_template_holds_every_loss_with_its_weights():
    from importlib.resources import files

    from pipeline.params.losses import LOSSES

    text = files("pipeline").joinpath("templates/kdpipe.yaml").read_text()
    for name, kind in LOSSES.items():
        weights = "".join(f", {weight}: {value}" for weight, value in kind().weights.items())
        assert f"{{name: {name}{weights}}}" in text or (not weights and f"{name}: " in text)


def test_a_missing_config_says_what_writes_one(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; `kdpipe init FOLDER` writes one"):
        load_config(tmp_path / "kdpipe.yaml", STAGES)


@pytest.mark.parametrize("in_file", [True, False])
def test_exponents_are_numbers(tmp_path, in_file):
    text = MINIMAL + ("distill: {learning_rate: 1e-3}" if in_file else "")
    config = load(tmp_path, text, changes=() if in_file else ["distill.learning_rate=1e-3"])
    assert config.params["distill"].learning_rate == pytest.approx(1e-3)


def test_set_changes_one_value(tmp_path):
    changes = ["distill.epochs=7", "seed=5", "ingest.teachers.0.weight=2", "run=other"]
    config = load(tmp_path, MINIMAL, changes=changes)
    assert config.params["distill"].epochs == 7
    assert config.params["ingest"].teachers[0].weight == 2.0
    assert (config.seed, config.run) == (5, "other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("distill.epochs", "write stage.key=value"),
        ("distill.epoch=3", "unknown key 'distill.epoch'"),
        ("seed.x=3", "'x' to set|no keys below"),
        ("ingest.teachers.4.weight=1", "no keys below"),
        ("distill.epochs=[", "not YAML"),
    ],
)
def test_a_set_that_fits_nothing_is_refused(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, MINIMAL + "seed: 1", changes=[change])


def test_a_parameter_may_follow_another(tmp_path):
    config = load(tmp_path, MINIMAL, changes=["compile.backend=voyager"])
    assert config.params["calibrate"].backend == "voyager"
    config = load(tmp_path, MINIMAL + "calibrate: {backend: emulator}\ncompile: {backend: voyager}")
    assert config.params["calibrate"].backend == "emulator"


def test_the_nearest_word_or_all_of_them():
    assert nearest("compil", ["compile", "distill"]) == "; did you mean 'compile'?"
    assert nearest("zzz", ["b", "a"]) == "; there are a, b"
    assert not re.search("there are", nearest("zzz", map(str, range(30))))
