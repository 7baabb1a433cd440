"""Fixtures around the tiny project."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny_project import Project, write_project

# Two workers share two cores, and every command that a test starts is a process of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared machine stalls now and then; that is no counterexample, and no fault of the data's.
settings.register_profile(
    "kdpipe", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kdpipe")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project in which nothing ran yet."""
    return write_project(tmp_path / "project")


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = write_project(tmp_path_factory.mktemp("finished") / "project")
    result = project.kdpipe("run", "--debug")
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture
def finished(_finished: Project, tmp_path: Path) -> Project:
    """A copy of a project whose five stages are fresh."""
    root = tmp_path / "project"
    shutil.copytree(_finished.root, root)
    return Project(root)


@pytest.fixture
def read_only_folder() -> Path:
    """A folder in which nobody, root included, can make files."""
    folder = Path("/proc/self/task")
    if os.access(folder / "x", os.W_OK):  # pragma: no cover
        pytest.skip("this system lets everybody write to /proc")
    return folder
