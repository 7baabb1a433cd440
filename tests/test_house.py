"""The rules of the house that no linter can see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import kdpipe
import metis
import pipeline
import preprocessing

ROOT = Path(__file__).parents[1]


def tracked():
    result = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in result.stdout.splitlines()]


def test_the_packages_are_ours():
    for package in (kdpipe, metis, pipeline, preprocessing):
        assert Path(package.__file__).parent.parent == ROOT


def test_deploy_and_tests_are_no_packages():
    assert not list((ROOT / "deploy").rglob("__init__.py"))
    inits = (ROOT / "tests").rglob("__init__.py")
    # Inside the stand-in, `axelera.compiler` is a package; `axelera` itself is none.
    assert not [path for path in inits if path.parents[1].name != "axelera"]


def test_no_file_is_a_drawer():
    names = {path.name for path in tracked()}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}


def rooms():
    """Folders of source files."""
    return sorted(
        {p.parent for name in ("kdpipe", "metis", "pipeline") for p in (ROOT / name).rglob("*.py")}
    )


def test_every_room_says_what_it_is_for():
    for room in rooms():
        docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert docstring and len(docstring.splitlines()) == 1, room


def test_no_room_is_a_warehouse():
    for room in rooms():
        files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 13, room


def test_every_room_has_a_line_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    said = re.findall(r"^\| `(\S+)/` \| [\w`]", page, re.MULTILINE)
    there = [ROOT / "deploy", ROOT / "preprocessing", *rooms()]
    assert sorted(said) == sorted(str(room.relative_to(ROOT)) for room in there)


def test_constraints_name_packages_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


def test_what_travels_imports_nothing_of_kdpipe_but_preprocessing():
    for path in (*(ROOT / "deploy").glob("*.py"), *(ROOT / "preprocessing").glob("*.py")):
        imports = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert not {"kdpipe", "metis", "pipeline"} & set(imports), path


def test_declaring_every_stage_loads_nothing_heavy():
    code = (
        "import sys; from pipeline.stages import load_stages; load_stages(); "
        "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'timm', 'lightning', 'yaml', "
        "'matplotlib', 'jinja2', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_box_with_a_card_needs_nothing_of_the_extra_train():
    modules = [
        "calibration.curve",
        "calibration.study",
        "delivery.bundle",
        "delivery.compilation",
        "delivery.device_pipeline",
        "delivery.other_runtimes",
        "parity.verify",
        "reports.build",
        "reports.compare_benchmarks",
    ]
    code = f"""
import sys
from importlib import import_module

ABSENT = ("torch", "timm", "lightning", "onnxsim", "safetensors", "h5py", "tifffile")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(name + " is not on a box with a card")

sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    import_module("pipeline." + module)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
