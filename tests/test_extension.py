"""A new loss or backend costs one new file and one added line: tried in a copy of the source."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import make_teacher, write_project

ROOT = Path(__file__).parents[1]


class House:
    """A copy of the source that a test may add to."""

    def __init__(self, root):
        self.root = root
        for name in ("deploy", "kdpipe", "metis", "pipeline", "preprocessing"):
            shutil.copytree(
                ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        self.environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}

    def add(self, file, text, *, table, below, line):
        """One new file, and one line in a table below another line."""
        (self.root / file).write_text(text)
        path = self.root / table
        source = path.read_text()
        assert source.count(below) == 1
        path.write_text(source.replace(below, f"{below}{line}\n"))

    def python(self, code, *words):
        """What a program prints that runs with the copy."""
        command = [sys.executable, "-c", code, *map(str, words)]
        result = subprocess.run(
            command, env=self.environment, cwd=self.root, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def house(tmp_path):
    return House(tmp_path / "house")


LOSS = '''"""Squared differences of softened logits."""

from pipeline.training.losses.softening import soften


def mse_loss(student, teacher, labels, *, temperature, standardize=False, scale=1.0):
    student, teacher = soften(student, teacher, temperature, standardize)
    return scale * ((student - teacher) ** 2).mean()
'''

TRAINING_STEP = """
import sys
from pathlib import Path

import torch

from pipeline.run.config import load_config
from pipeline.run.errors import ConfigError
from pipeline.stages import load_stages
from pipeline.training.batches import Batch
from pipeline.training.module import Distillation
from pipeline.params.distill import describe_loss


def load(*changes):
    return load_config(Path(sys.argv[1]), load_stages(), changes=changes).params["distill"]


print(load("distill.loss=mse").loss.weights)
params = load("distill.loss={name: mse, scale: 3}", "distill.hard_weight=0")
print(describe_loss(params))
try:
    load("distill.loss={name: mse, scael: 3}")
except ConfigError as error:
    print(error)
student = torch.nn.Linear(2, 3, bias=False)
torch.nn.init.zeros_(student.weight)
batch = Batch(torch.ones(1, 2), torch.tensor([0]), torch.tensor([[2.0, 4.0, 6.0]]), ())
module = Distillation(student, params, 1, seed=0)
print(module.training_step(batch, 0).item())
"""


def add_loss(house):
    house.add(
        "pipeline/training/losses/mse.py",
        LOSS,
        table="pipeline/params/losses.py",
        below="_KINDS = (\n",
        line='    _soft_loss("mse", "MSE", f"{_ROOM}.mse:mse_loss", scale=1.0),',
    )


def test_a_loss_is_one_file_and_one_line(house, tmp_path):
    add_loss(house)
    config = write_project(tmp_path / "project").root / "kdpipe.yaml"
    said = house.python(TRAINING_STEP, config).splitlines()
    assert said[:3] == [
        "{'scale': 1.0}",
        "0 * CE + 0.3 * MSE, T = 2",
        "kdpipe.yaml: unknown key 'distill.loss.scael'; did you mean 'scale'?",
    ]
    # A third of 1 + 4 + 9, times the scale, times soft_weight.
    assert float(said[3]) == pytest.approx(0.3 * 3 * 14 / 3)


BACKEND = '''"""The emulator, seen in a mirror."""

from metis.emulator.backend import Emulator


class Mirror(Emulator):
    name = "mirror"

    def arithmetic(self, scheme):
        return f"mirrored {scheme}"
'''

INT8 = """
import sys
from pathlib import Path

import numpy as np

from metis.backend import open_backend
from pipeline.delivery.doctor import examine_machine
from pipeline.run.config import load_config
from pipeline.stages import load_stages

config, student, folder = map(Path, sys.argv[1:])
params = load_config(config, load_stages(), changes=["compile.backend=mirror"]).params
backend = open_backend(params["calibrate"].backend, params["calibrate"].sdk)
samples = np.random.default_rng(0).normal(size=(4, 1, 3, 16, 16)).astype(np.float32)
np.save(folder / "samples.npy", samples)
model = backend.quantize(
    student, folder / "samples.npy", folder / "int8", scheme=params["calibrate"].scheme
)
compiled = backend.compile(model, folder / "compiled", aipu_cores=1)
print(compiled.backend, *backend.infer(model, samples[:, 0]).shape)
machine = examine_machine()
print(machine["backends"]["mirror"])
print(machine["mirror"]["arithmetic"])
"""


def add_backend(house):
    house.add(
        "metis/emulator/mirror.py",
        BACKEND,
        table="metis/backend.py",
        below="BACKENDS = {\n",
        line='    "mirror": BackendEntry("metis.emulator.mirror:Mirror", (), "mirror"),',
    )


def test_a_backend_is_one_file_and_one_line(house, tmp_path):
    add_backend(house)
    project = write_project(tmp_path / "project")
    student = tmp_path / "student.onnx"
    make_teacher(student, (0, 1, 2), project.contract, batch=1)
    said = house.python(INT8, project.root / "kdpipe.yaml", student, tmp_path).splitlines()
    assert said[0] == "mirror 4 3"
    assert said[1].startswith("available: onnxruntime")
    assert said[2] == "mirrored per_tensor_histogram"


@pytest.mark.slow
def test_a_run_goes_through_a_new_backend(house, tmp_path):
    add_backend(house)
    project = write_project(tmp_path / "project")
    words = ("run", "--set", "compile.backend=mirror")
    result = project.kdpipe(*words, env=house.environment)
    assert result.returncode == 0, result.stderr
    stages = json.loads((project.folder / "manifest.json").read_text())["stages"]
    assert stages["calibrate"]["facts"]["arithmetic"] == "mirrored per_tensor_histogram"
    assert stages["compile"]["facts"]["backend"] == "mirror"


@pytest.mark.slow
def test_a_run_distills_with_a_new_loss(house, tmp_path):
    add_loss(house)
    project = write_project(tmp_path / "project")
    words = ("run", "--to", "distill", "--set", "distill.loss=mse")
    result = project.kdpipe(*words, env=house.environment)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((project.folder / "manifest.json").read_text())
    assert manifest["stages"]["distill"]["facts"]["loss"] == "0.7 * CE + 0.3 * MSE, T = 2"
