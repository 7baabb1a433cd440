"""The files of a bundle, read and checked against their digests. Beside kdbench.py, numpy only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.contract import load_contract
from preprocessing.student_input import StudentInput
from preprocessing.int8 import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Of bundle.json; a bundle of another release brings its own kdbench.py.
SCHEMA = 2


class CheckError(Exception):
    """The bundle can't be measured; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what its index says."""

    folder: Path
    index: dict[str, Any]
    given: StudentInput
    inputs: TensorSpec  # of one call
    outputs: TensorSpec  # of one call

    @property
    def batch(self) -> int:
        """Frames per call."""
        return self.inputs.shape[0]

    @property
    def model(self) -> Path:
        """What the runtime loads."""
        return self.folder / str(self.index["model"])

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """All arrays of golden.npz or test.npz."""
        with np.load(self.folder / name) as archive:
            return {**archive}


def open_bundle(folder: Path) -> Bundle:
    """Read bundle.json, verify the digest of every file it lists, and read the rest.

    Raises:
        CheckError: status 3; the file that is missing, damaged or of another contract is named.
    """
    try:
        index = json.loads((folder / "bundle.json").read_text())
        files = index["files"]
        if index["schema"] != SCHEMA:
            raise ValueError(f"its schema is {index['schema']}, this kdbench reads {SCHEMA}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"{folder} is not a bundle: {error}", 3) from error
    for name, expected in files.items():
        _check_digest(folder, name, expected)
    try:
        contract = load_contract(folder / "preprocessing.json")
        given = StudentInput.load(folder / "student_input.json")
        bundle = Bundle(
            folder=folder,
            index=index,
            given=given,
            inputs=TensorSpec.from_json(index["inputs"][0]),
            outputs=TensorSpec.from_json(index["outputs"][0]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckError(f"{folder} is not a whole bundle: {error!r}", 3) from error
    for name, digest in (
        ("preprocessing.json", contract.sha256),
        ("student_input.json", given.contract),
    ):
        if digest != index["contract"]:
            raise CheckError(f"{name} is of another contract: {digest}, not {index['contract']}", 3)
    return bundle


def _check_digest(folder: Path, name: str, expected: str) -> None:
    parts = PurePosixPath(name).parts
    if ".." in parts or name.startswith("/"):
        raise CheckError(f"bundle.json lists {name}, which is outside the bundle", 3)
    path = folder / name
    if not path.is_file():
        raise CheckError(f"{name} is missing from the bundle", 3)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise CheckError(f"{name} is damaged: expected sha256 {expected}, found {digest}", 3)
