"""What an extra brings is asked for by name, before anything is written; the base does without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

READERS = ("h5py", "png", "tifffile")

TRAINING = ("torch", "timm", "lightning", "onnxsim", "safetensors", "tensorboardX", "torchvision")

#: Files and rooms that import what an extra brings.
HEAVY = (
    "pipeline.data.formats.so2sat_h5",
    "pipeline.data.formats.image_folder",
    "pipeline.data.synthetic",
)


def without(packages, folder):
    """An environment in which Python finds none of these packages."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    (folder / "sitecustomize.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture
def no_readers(tmp_path_factory):
    return without(READERS, tmp_path_factory.mktemp("no_readers"))


def test_a_base_install_imports_everything_but_readers_and_training():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("kdpipe", "metis", "pipeline", "preprocessing")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name not in ("__main__.py", "child.py")
    ]
    code = (
        "import importlib, sys\n"
        "class Absent:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name in {(*READERS, *TRAINING)}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent)\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(name, error.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, package in refused if package in READERS] == sorted(HEAVY)
    assert {package for _, package in refused} <= {*READERS, *TRAINING}


def test_patches_of_numpy_need_no_readers(project, no_readers):
    done = project.kdpipe("run", "--stage", "ingest", env=no_readers)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("format", "missing"), [("so2sat-h5", "h5py"), ("image-folder", "png, tifffile")]
)
def test_a_format_without_its_reader_is_one_line(project, no_readers, format, missing):
    done = project.kdpipe("run", "--set", f"ingest.data.format={format}", env=no_readers)
    assert (done.returncode, done.stderr) == (
        5,
        f"Error: {missing} not installed; the extra 'data' brings what is missing:  "
        "pip install 'kdpipe[data]'\n",
    )
    assert not project.folder.exists()


def test_synthetic_patches_without_their_writer_are_one_line(project, no_readers):
    done = project.kdpipe("synth", "so2sat", "out.h5", "--patches=5", env=no_readers)
    assert done.returncode == 5
    assert done.stderr.startswith("Error: h5py not installed; the extra 'data' brings")
    assert not (project.root / "out.h5").exists()


def test_a_box_with_a_card_opens_no_files_of_the_user(finished, no_readers):
    assert finished.kdpipe("run", env=no_readers).returncode == 0
    done = finished.kdpipe("run", "--stage", "compile", "--force", env=no_readers)
    assert done.returncode == 0, done.stderr
    done = finished.kdpipe("bundle", "box", env=no_readers)
    assert done.returncode == 0, done.stderr
    assert json.loads((finished.root / "box" / "bundle.json").read_text())["files"]
