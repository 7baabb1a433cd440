"""An interpreter of its own with the stand-in SDK: a virtual environment, as a user would have."""

from __future__ import annotations

import shutil
import sysconfig
import venv
from pathlib import Path

FAKES = Path(__file__).parent / "fakes"


def install_stand_in(folder: Path, devkit: str = "1.8.0", rt: str | None = "same") -> Path:
    """Make a virtual environment with devkit and rt of these releases; return its Python.

    `rt` None: not installed. Our own packages are not in it, numpy and onnxruntime are.
    """
    venv.create(folder, symlinks=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    release(packages, "axelera-devkit", devkit)
    if rt is not None:
        release(packages, "axelera-rt", devkit if rt == "same" else rt)
    # Path lines only: an editable install's hook in there must not run.
    places = {FAKES, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}
    (packages / "stand_in.pth").write_text("".join(f"{place}\n" for place in sorted(places)))
    for program in (FAKES / "bin").iterdir():
        shutil.copy(program, folder / "bin")
    return folder / "bin" / "python"


def release(packages: Path, name: str, version: str) -> None:
    """Say that a distribution is installed."""
    info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def packages_of(python: Path) -> Path:
    """site-packages of a stand-in's interpreter."""
    return next((python.parents[1] / "lib").glob("python*")) / "site-packages"
