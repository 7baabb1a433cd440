"""A data format costs one file and one line: one is added to a copy of the code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from tiny_project import write_project

ROOT = Path(__file__).parents[3]

FILE = '''"""Patches in MATLAB files: images (N, H, W, bands) and labels (N,)."""

from scipy.io import loadmat

from pipeline.data.source import PatchSource, check_patches, pick_bands


def from_mat(data, path, labels, classes):
    """Format mat; see `pipeline.params.formats`."""
    arrays = loadmat(path)
    images = arrays["images"]
    check_patches(path, "images", images)
    return PatchSource(
        path=path,
        count=len(images),
        shapes={data.only_modality(): images.shape[1:]},
        labels=arrays["labels"].ravel().astype("int64"),
        reader=lambda modality, rows, bands: pick_bands(images[rows], bands),
    )
'''

LINE = '    "mat": Format("pipeline.data.formats.mat:from_mat"),\n'


@pytest.fixture
def code(tmp_path):
    """A copy of the code, with the format."""
    for package in ("kdpipe", "metis", "pipeline", "preprocessing", "deploy"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "pipeline" / "data" / "formats" / "mat.py").write_text(FILE)
    table = tmp_path / "pipeline" / "params" / "formats.py"
    text = table.read_text()
    assert text.count("FORMATS = {\n") == 1
    table.write_text(text.replace("FORMATS = {\n", f"FORMATS = {{\n{LINE}"))
    return tmp_path


def test_a_format_is_one_file_and_one_line(code, tmp_path):
    project = write_project(tmp_path / "project")
    for name in ("train", "test"):
        with np.load(project.root / f"{name}.npz") as archive:
            savemat(project.root / f"{name}.mat", dict(archive))
        project.edit("ingest", "data", name, "path", to=f"{name}.mat")

    def kdpipe(*words):
        return subprocess.run(
            [sys.executable, "-m", "kdpipe", *words],
            cwd=project.root,
            env={**os.environ, "PYTHONPATH": str(code)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    project.edit("ingest", "data", "format", to="mat")
    result = kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0, result.stderr
    with np.load(project.root / "test.npz") as archive:
        labels = archive["labels"]
    assert np.array_equal(np.load(project.artifact("test_set") / "labels.npy"), labels)
    project.edit("ingest", "data", "format", to="mad")
    result = kdpipe("status")
    assert result.returncode == 2
    assert "did you mean 'mat'?" in result.stderr
