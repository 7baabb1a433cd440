"""Assemble the folder that travels to the device."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.manifest import folder_files
from pipeline.stage import StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metis.backend import CompiledModel

SCHEMA = 1


def write_bundle(
    into: Path,
    *,
    compiled: CompiledModel,
    contract: Path,
    student_input: Path,
    labels: Path,
    contract_sha256: str,
    golden: dict[str, NDArray[np.generic]],
    test: dict[str, NDArray[np.generic]],
) -> None:
    """Write a bundle that needs nothing but Python, numpy and the model's runtime.

    Args:
        into: folder to make.
        compiled: the model that travels.
        contract: preprocessing.json, copied byte for byte.
        student_input: student_input.json.
        labels: labels.txt.
        contract_sha256: digest that the contract must have.
        golden: images (uint8, NHWC), tensors (float32, NCHW), logits (float32, of the int8 model on
            the host).
        test: images (uint8, NHWC), labels (int64).
    """
    import numpy

    shutil.copytree(compiled.path, into / "model")
    for source in (contract, student_input, labels):
        shutil.copyfile(source, into / source.name)
    numpy.savez(into / "golden.npz", allow_pickle=False, **golden)
    numpy.savez(into / "test.npz", allow_pickle=False, **test)
    package = Path(__file__).resolve().parent.parent / "preprocessing"
    (into / "preprocessing").mkdir()
    for module in sorted(package.glob("*.py")):
        shutil.copyfile(module, into / "preprocessing" / module.name)
    for file in sorted(_deploy_folder().iterdir()):
        if file.is_file():
            shutil.copyfile(file, into / file.name)
    index = {
        "schema": SCHEMA,
        "contract": contract_sha256,
        "runtime": compiled.runtime,
        "aipu_cores": compiled.aipu_cores,
        "model": f"model/{compiled.entry}",
        "inputs": [asdict(spec) for spec in compiled.inputs],
        "outputs": [asdict(spec) for spec in compiled.outputs],
        "files": {
            file.relative_to(into).as_posix(): sha256(file.read_bytes()).hexdigest()
            for file in folder_files(into)
        },
    }
    (into / "bundle.json").write_text(json.dumps(index, indent=1) + "\n")


def _deploy_folder() -> Path:
    """The programs that travel: inside an installed wheel, or beside the packages in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_deploy", here.parent / "deploy"):
        if (folder / "kdbench.py").is_file():
            return folder
    raise StageError("kdbench.py is not installed with kdpipe; install kdpipe again")
