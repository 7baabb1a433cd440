"""kdpipe uses the packages that came with it, whatever else is called like them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdpipe
from kdpipe.packages import PACKAGES

ROOT = Path(__file__).parents[1]

#: As pip writes it for the entry point `kdpipe:main`.
PROGRAM = "import sys\nfrom kdpipe import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture
def hostile(tmp_path):
    """A folder of a user whose own code has our names."""
    for name in ("pipeline", "preprocessing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "metis.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def python(folder, *words):
    """Run Python in a folder that also comes first on its path."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("program", [("-m", "kdpipe"), ("program.py",)])
def test_a_users_packages_of_our_names_are_not_ours(hostile, program):
    done = python(hostile, *program, "doctor")
    assert done.returncode == 0, done.stderr
    assert "emulator         available: onnxruntime" in done.stdout
    done = python(hostile, *program, "run")
    assert (done.returncode, done.stderr) == (
        2,
        "Error: kdpipe.yaml does not exist; `kdpipe init FOLDER` writes one, -c names another\n",
    )


def test_the_users_own_code_still_finds_its_packages(hostile):
    done = python(hostile, "-c", "import pipeline")
    assert "not ours" in done.stderr


def test_processes_that_start_from_ours_find_our_packages(hostile):
    """As data loaders do where they don't fork."""
    code = PROGRAM.replace(
        "    sys.exit(main())",
        "    from multiprocessing import get_context\n"
        "    with get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(eval, (\"__import__('metis').__file__\",)))",
    )
    (hostile / "program.py").write_text(code)
    done = python(hostile, "program.py")
    assert done.stdout.strip() == str(ROOT / "metis" / "__init__.py"), done.stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_a_foreign_package_that_is_imported_already_is_one_line(tmp_path, name):
    (tmp_path / f"{name}.py").touch()
    done = python(tmp_path, "-c", f"import {name}, kdpipe; kdpipe.main()")
    assert done.returncode == 5
    assert done.stderr == (
        f"Error: another package called {name!r} is imported already, from "
        f"{tmp_path / name}.py; import kdpipe before it, or in a process of its own\n"
    )


def test_our_packages_may_be_imported_before(tmp_path):
    done = python(tmp_path, "-c", "import metis, pipeline, preprocessing, kdpipe; kdpipe.main()")
    assert done.stderr.startswith("Usage: kdpipe")


def test_importing_it_imports_nothing_else(tmp_path):
    code = "import sys, kdpipe; print({'pipeline', 'click', 'msgspec', 'pathlib'} & {*sys.modules})"
    before = python(tmp_path, "-c", code.replace(", kdpipe", "")).stdout
    assert python(tmp_path, "-c", code).stdout == before


def test_its_version_is_the_distributions():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{kdpipe.__version__}"' in text
    assert re.search(r'^kdpipe = "kdpipe:main"$', text, re.MULTILINE)
