"""The artifacts of a run by attribute: what they are, and where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Artifacts:
    """Paths of artifacts: those of a whole run, or those that one stage reads or writes."""

    # ingest
    contract: Path  # preprocessing.json, a copy of the user's
    labels: Path  # text, one class per line
    student_input: Path  # JSON, see `preprocessing.student_input`
    dataset: Path  # folder with a folder per split, all but test
    test_set: Path  # folder of the test split
    teaching: Path  # folder, what the teachers say of the patches that train
    unfit: Path  # JSON, rows of train that must not calibrate
    # distill
    student: Path  # float ONNX
    training: Path  # folder: weights, curves, other students
    # calibrate
    calibration_set: Path  # folder: samples.npy, samples.json
    baked_student: Path  # float ONNX with weights on the int8 grid
    ranges: Path  # JSON, the range of every tensor
    quantized_model: Path  # folder, see `metis.backend.QuantizedModel`
    # compile
    compiled_model: Path  # folder, see `metis.backend.CompiledModel`
    device_pipeline: Path  # folder: the SDK's YAML and what it names
    # benchmark
    bundle: Path  # folder that runs on its own
    benchmark_report: Path  # folder: report.json and its pages

    def __init__(self, paths: Mapping[str, Path], owner: str) -> None:
        """Hold paths by name; `owner` is for messages, such as "inputs of distill"."""
        vars(self).update(paths)
        self._owner = owner

    if not TYPE_CHECKING:  # a type checker shall refuse names that are not above

        def __getattr__(self, name: str) -> Path:
            if name.startswith("_"):  # what copy and pickle ask for
                raise AttributeError(name)
            names = ", ".join(name for name in vars(self) if not name.startswith("_")) or "none"
            raise LookupError(f"{name} is not among the {self._owner} ({names})")

    def __getitem__(self, name: str) -> Path:
        """The path of an artifact whose name is a value."""
        path: Path = getattr(self, name)
        return path

    def __contains__(self, name: str) -> bool:
        return name in vars(self)
