"""Assemble the folder that travels to the device, and pack it."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metis.backend import CompiledModel, QuantizedModel, SdkOptions, open_backend
from pipeline.data.dataset import StudentData
from pipeline.delivery.device_run import deploy_folder
from pipeline.networks.inference import reference_network
from pipeline.run.files import folder_files, new_folder
from preprocessing.scores import decide

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from pipeline.artifacts import Artifacts
    from pipeline.params.benchmark import BenchmarkParams, BundleLimits
    from pipeline.run.stage import Job
    from pipeline.run.state import RunState


SCHEMA = 2


def assemble_bundle(
    inputs: Artifacts,
    folder: Path,
    *,
    golden_samples: int,
    limits: BundleLimits,
    sdk: SdkOptions | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Write a bundle that needs nothing but Python, numpy and the model's runtime.

    The same artifacts give the same bytes.

    Args:
        inputs: the artifacts of `pipeline.params.benchmark.BUNDLED`, verified.
        folder: folder to fill, or to make.
        golden_samples: validation images that prove the bundle where it runs.
        limits: what kdbench accepts there.
        sdk: options for the SDK, where it quantized the model.
        progress: called with the number of test images that the float student has just answered.
    """
    data = StudentData(inputs)
    compiled = CompiledModel.load(inputs.compiled_model)
    folder.mkdir(exist_ok=True)
    shutil.copytree(compiled.path, folder / "model")
    for name in ("contract", "student_input", "labels"):
        shutil.copyfile(inputs[name], folder / inputs[name].name)
    for yaml in inputs.device_pipeline.glob("*.yaml"):
        shutil.copyfile(yaml, folder / "pipeline.yaml")
    _save_arrays(folder / "golden.npz", _golden(inputs, data, golden_samples, sdk))
    _save_arrays(folder / "test.npz", _test(inputs, data, progress))
    _copy_programs(folder)
    _write_index(folder, compiled, data, limits)


def _copy_programs(folder: Path) -> None:
    """Copy kdbench with its pages, and the package preprocessing, which is all that it imports."""
    package = Path(__file__).resolve().parents[2] / "preprocessing"
    (folder / "preprocessing").mkdir()
    for module in sorted(package.glob("*.py")):
        shutil.copyfile(module, folder / "preprocessing" / module.name)
    for file in sorted(deploy_folder().iterdir()):
        if file.suffix in (".py", ".md"):
            shutil.copyfile(file, folder / file.name)


def _write_index(
    folder: Path, compiled: CompiledModel, data: StudentData, limits: BundleLimits
) -> None:
    """Write bundle.json: what the bundle is, how to run it, and the digest of every file."""
    files = {
        file.relative_to(folder).as_posix(): sha256(file.read_bytes()).hexdigest()
        for file in folder_files(folder)
    }
    model = {name: digest for name, digest in files.items() if name.startswith("model/")}
    index = {
        "schema": SCHEMA,
        "task": data.task.name,
        "contract": data.contract.sha256,
        "runtime": compiled.runtime,
        "backend": f"{compiled.backend} {compiled.version}",
        "aipu_cores": compiled.aipu_cores,
        "model": f"model/{compiled.entry}",
        "model_digest": sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
        "preamble": compiled.preamble and f"model/{compiled.preamble}",
        "postamble": compiled.postamble and f"model/{compiled.postamble}",
        "session": compiled.session,
        "inputs": [asdict(spec) for spec in compiled.inputs],
        "outputs": [asdict(spec) for spec in compiled.outputs],
        "limits": asdict(limits),
        "files": files,
    }
    (folder / "bundle.json").write_text(json.dumps(index, indent=1) + "\n")


def write_bundle(job: Job, params: BenchmarkParams) -> None:
    """Write the artifact `bundle`."""
    test = job.facts.ingest.splits["test"]
    with job.progress("float student on test", test.patches) as bar:
        assemble_bundle(
            job.inputs,
            job.outputs.bundle,
            golden_samples=params.golden_samples,
            limits=params.bundle_limits,
            sdk=params.sdk,
            progress=bar.update,
        )


def write_whole(state: RunState, dest: Path) -> int:
    """The bundle of a run that is compiled; all of it, or nothing.

    Args:
        state: of the run; its artifacts were examined.
        dest: folder to make.

    Returns:
        How many files it has.

    Raises:
        InputError: there is something already, or it can't be written there.
    """
    params = state.config.params["benchmark"]
    with new_folder(dest) as folder:
        assemble_bundle(
            state.paths,
            folder,
            golden_samples=params.golden_samples,
            limits=params.bundle_limits,
            sdk=params.sdk,
        )
    return sum(1 for _ in folder_files(dest))


def _golden(
    inputs: Artifacts, data: StudentData, count: int, sdk: SdkOptions | None
) -> dict[str, NDArray[np.generic]]:
    """Images (uint8, NHWC), tensors (float32, NCHW), logits (float32, of the int8 host model)."""
    golden = data.val.spread(count)
    tensors = data.tensors(golden)
    quantized = QuantizedModel.load(inputs.quantized_model)
    logits = open_backend(quantized.backend, sdk).infer(quantized, tensors)
    return {"images": golden.images, "tensors": tensors, "logits": logits}


def _test(
    inputs: Artifacts, data: StudentData, progress: Callable[[int], object]
) -> dict[str, NDArray[np.generic]]:
    """Images (uint8, NHWC), labels (int64), float_classes (int64, of the float student)."""
    network = reference_network(inputs.student)
    classes = []
    for _, tensors in data.blocks(data.test, 256):
        classes.append(decide(network(tensors)))
        progress(len(tensors))
    return {
        "images": data.test.images,
        "labels": data.test.labels,
        "float_classes": np.concatenate(classes).astype(np.int64),
    }


def _save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def pack_bundle(folder: Path, archive: Path) -> str:
    """Write the folder as a .tar.gz whose bytes depend on its files and its name alone.

    Args:
        folder: the bundle.
        archive: file to write; it holds one folder, named as `folder` is.

    Returns:
        sha256 of the archive.
    """
    with (
        archive.open("wb") as out,
        # No name and no time in gzip's header; no owner, time or umask in tar's.
        gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        files = {file.relative_to(folder).as_posix(): file for file in folder_files(folder)}
        for name, file in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size = file.stat().st_size
            entry.mode = 0o644
            with file.open("rb") as source:
                tar.addfile(entry, source)
    return sha256(archive.read_bytes()).hexdigest()
