import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml

from pipeline.params.guides import PRESETS, convert
from pipeline.run.errors import InputError

KDPIPE = Path(sys.executable).parent / "kdpipe"

CONFIG_PY = """
import os
USE_DISTILLATION = True
TEACHER_MODEL = "efficientnet_b4"
STUDENT_MODEL = "efficientnet_b0"
TEACHER_MODEL_PATH = os.environ["TEACHER"]
DISTILLATION_TEMPERATURE = 4.0
DISTILLATION_ALPHA = 0.7
"""

YAML = """
distillation: {temperature: 2.0, alpha: 0.7, feature_loss_weight: 0.1}
training: {epochs: 30, lr: 3.0e-4, scheduler: step, lr_step_size: 5}
"""


def test_the_same_alpha_means_two_things(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_PY)
    soft, unknown = convert(path, "soft")
    assert soft == {
        "student": "efficientnet_b0",
        "temperature": 4.0,
        "hard_weight": 0.3,
        "soft_weight": 0.7,
    }
    assert unknown == ["TEACHER_MODEL"]
    hard, _ = convert(path, "hard")
    assert (hard["hard_weight"], hard["soft_weight"]) == (0.7, 0.3)
    with pytest.raises(
        InputError, match=r"DISTILLATION_ALPHA = 0\.7 is the weight of the labels in"
    ):
        convert(path, None)


def test_a_switch_that_is_off_is_training_without_teacher(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_PY.replace("True", "False"))
    section, _ = convert(path, "soft")
    assert (section["hard_weight"], section["soft_weight"]) == (1.0, 0.0)


def test_the_command_prints_a_section_for_kdpipe_yaml_and_runs_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text(YAML)
    command = [KDPIPE, "convert", "c.yaml", "--alpha-is", "hard"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(result.stdout)["distill"] == {
        "temperature": 2.0,
        "hard_weight": 0.7,
        "soft_weight": 0.3,
        "feature_weight": 0.1,
        "epochs": 30,
        "learning_rate": 3e-4,
        "schedule": "step",
        "lr_step_epochs": 5,
    }
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nALPHA = 3\n")
    command[2] = "evil.py"
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, "a weight from 0 to 1" in result.stderr) == (3, True)
    assert not (tmp_path / "ran").exists()


def run(*words, cwd):
    return subprocess.run(
        [KDPIPE, "convert", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_section_whose_student_has_the_size_it_says(tmp_path, name):
    result = run("--preset", name, cwd=tmp_path)
    section = yaml.safe_load(result.stdout)["distill"]
    assert section["hard_weight"] + section["soft_weight"] == pytest.approx(1)
    assert result.stderr == ""  # within the ranges of the guide
    network = timm.create_model(section["student"], num_classes=1000)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(millions, 2) == PRESETS[name]["million"]


def test_values_beyond_the_usual_are_noted_and_not_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("temperature: 25\nalpha: 0.05\n")
    result = run("c.yaml", "--alpha-is", "soft", cwd=tmp_path)
    assert result.returncode == 0
    assert yaml.safe_load(result.stdout)["distill"]["temperature"] == 25
    assert "note: temperature 25 lies outside the usual 3 to 10" in result.stderr
    assert "note: soft_weight 0.05 lies outside the usual 0.5 to 0.9" in result.stderr


def test_a_preset_that_is_not_there_and_nothing_at_all_are_wrong_words(tmp_path):
    unknown = run("--preset", "b4-to-b9", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "there is no preset 'b4-to-b9'; did you mean 'b4-to-b0'" in unknown.stderr
    assert run(cwd=tmp_path).returncode == 2
