"""Check teachers, contract and data against each other; store what the later stages need."""

from __future__ import annotations

import glob
import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from pipeline.sources import Bands, DataParams, TeacherParams
from pipeline.stage import Facts, InputError, Job, Stage, path_field
from preprocessing.contract import StudentInput, contract_encoding, load_contract

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.datasets import Split
    from pipeline.sources import SplitParams
    from pipeline.teachers import Teacher
    from preprocessing.contract import Contract

#: Patches handled at a time.
BLOCK = 2048


@dataclass(frozen=True)
class StudentParams:
    """What the student sees."""

    bands: Bands  # that it sees, in channel order
    modality: str = "optical"
    size: Annotated[int, Meta(ge=1)] = 32  # height and width of the network's input
    interpolation: Literal["nearest", "bilinear"] = "nearest"


@dataclass(frozen=True)
class IngestParams:
    """What to take in."""

    data: DataParams
    teachers: Annotated[tuple[TeacherParams, ...], Meta(min_length=1)]
    student: StudentParams
    contract: str = path_field("preprocessing.json")
    labels: str | None = path_field(None)  # text, one class per line; must equal the contract's
    max_mean_shift: Annotated[float, Meta(gt=0)] = 0.5  # of mu from the data's, in data sigmas
    max_sigma_ratio: Annotated[float, Meta(gt=1)] = 1.5  # of sigma to the data's, either way


def sources(params: IngestParams, root: Path) -> dict[str, Path]:
    """The contract, the labels, every data file, every teacher that a pattern matches."""
    found = {"contract": root / params.contract}
    if params.labels is not None:
        found["labels"] = root / params.labels
    for name in ("train", "val", "test"):
        split: SplitParams = getattr(params.data, name)
        if split.path is not None:
            found[f"data.{name}"] = root / split.path
    for i, teacher in enumerate(params.teachers):
        if not glob.has_magic(teacher.path):
            found[f"teachers[{i}]"] = root / teacher.path
            continue
        folder, _, pattern = teacher.path.rpartition("/")
        for j, match in enumerate(sorted((root / folder).glob(pattern))):
            found[f"teachers[{i}].{j}"] = match
    return found


def run(job: Job, params: IngestParams) -> Facts:
    """Check everything, then write images, labels and the ensemble's logits."""
    from pipeline.datasets import open_splits  # numpy

    contract = load_contract(job.sources["contract"])
    _check_labels_file(job, contract)
    files = _data_files(job, params)
    splits = open_splits(params.data, files, len(contract.labels), job.seed)
    student = _student_input(params.student, contract, splits["train"])
    teachers = _open_teachers(job, params, contract, splits["train"])

    statistics = _check_statistics(job, params, contract, splits["train"])
    dataset = _write_dataset(job, contract, student, splits)
    shutil.copyfile(job.sources["contract"], job.outputs["contract"])
    job.outputs["labels"].write_text("".join(f"{label}\n" for label in contract.labels))
    job.outputs["student_input"].write_text(student.to_json())
    return {
        "splits": dataset["splits"],
        "bands": statistics,
        "teachers": _label(job, contract, teachers, splits),
        "student_input": asdict(student),
    }


def _check_labels_file(job: Job, contract: Contract) -> None:
    if "labels" not in job.sources:
        return
    path = job.sources["labels"]
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(lines) != len(contract.labels):
        raise InputError(
            f"{path.name} names {len(lines)} classes and preprocessing.json labels "
            f"{len(contract.labels)}"
        )
    for i, (line, label) in enumerate(zip(lines, contract.labels, strict=True)):
        if line != label:
            raise InputError(
                f"{path.name}: class {i} is {line!r}, but preprocessing.json labels[{i}] is "
                f"{label!r}"
            )


def _data_files(job: Job, params: IngestParams) -> dict[str, Path]:
    files = {}
    for name in ("train", "val", "test"):
        split: SplitParams = getattr(params.data, name)
        where = f"ingest.data.{name}"
        if split.fraction is not None and (split.path or split.rows):
            raise InputError(f"{where}: fraction takes from train; it goes without path and rows")
        if split.fraction is not None and name == "train":
            raise InputError(
                f"{where}: give the training split a path; the others may be fractions"
            )
        if split.fraction is None and split.path is None:
            raise InputError(f"{where}.path is missing: name the file of the {name} split")
        if split.path is not None:
            files[name] = job.sources[f"data.{name}"]
    return files


def _student_input(params: StudentParams, contract: Contract, train: Split) -> StudentInput:
    height, width, bands_in_data = train.source.shape(params.modality)
    return StudentInput(
        modality=params.modality,
        bands=params.bands,
        patch_hw=(height, width),
        size_hw=(params.size, params.size),
        interpolation=params.interpolation,
        half_pixel_centers=params.interpolation == "bilinear",
        # The device resizes bilinear, whatever its pipeline YAML says; so nearest is done before.
        device_resize=params.interpolation == "bilinear",
        encoding="contract",
        contract=contract.sha256,
        **contract_encoding(contract, params.modality, params.bands, bands_in_data),
    )


def _open_teachers(
    job: Job, params: IngestParams, contract: Contract, train: Split
) -> list[Teacher]:
    from pipeline.teachers import open_teacher  # onnxruntime

    teachers = []
    for i, given in enumerate(params.teachers):
        key = f"teachers[{i}]"
        files = {n: p for n, p in job.sources.items() if n == key or n.startswith(f"{key}.")}
        if not files:
            raise InputError(f"ingest.{key}.path: no file matches {given.path!r}")
        for name, path in files.items():
            bands_in_data = train.source.shape(given.modality)[2]
            teacher = open_teacher(path, given, contract, bands_in_data)
            for file in teacher.external:
                job.also_read(name, file)
            teachers.append(teacher)
    names = [teacher.name for teacher in teachers]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two teachers are called {name}; rename one file")
    return teachers


def _check_statistics(
    job: Job, params: IngestParams, contract: Contract, train: Split
) -> list[dict[str, Any]]:
    """Mean and sigma of the scaled training data beside the contract's, for every modality used."""
    import numpy as np

    from pipeline.datasets import band_statistics
    from preprocessing.apply import scale

    rows = []
    used = dict.fromkeys([*(t.modality for t in params.teachers), params.student.modality])
    for modality in used:
        bands = train.source.shape(modality)[2]
        sums, squares, count = np.zeros(bands), np.zeros(bands), 0
        with job.progress(f"statistics {modality}", len(train)) as bar:
            for start in range(0, len(train), BLOCK):
                patches = train.source.read(modality, train.rows[start : start + BLOCK])
                values = scale(patches, contract, modality).reshape(-1, bands).astype(np.float64)
                sums += values.sum(axis=0)
                squares += np.square(values).sum(axis=0)
                count += len(values)
                bar.update(len(patches))
        mean, sigma = band_statistics(sums, squares, count)
        given = contract.statistics(modality, range(bands), bands)
        for band in range(bands):
            rows.append(
                {
                    "modality": modality,
                    "band": band,
                    "mu_contract": given.mu[band] if given else None,
                    "mu_data": float(mean[band]),
                    "sigma_contract": given.sigma[band] if given else None,
                    "sigma_data": float(sigma[band]),
                }
            )
    _judge_statistics(job, params, rows)
    return rows


def _judge_statistics(job: Job, params: IngestParams, rows: list[dict[str, Any]]) -> None:
    """Refuse a contract whose mu and sigma are of other data, another scale or other bands."""
    wrong = []
    for row in rows:
        if row["mu_contract"] is None:
            continue
        sigma = row["sigma_data"]
        if sigma == 0:
            raise InputError(
                f"{row['modality']} band {row['band']} is constant ({row['mu_data']:g}) over the "
                "whole training split; it carries nothing"
            )
        shift = abs(row["mu_contract"] - row["mu_data"]) / sigma
        ratio = row["sigma_contract"] / sigma
        if shift > params.max_mean_shift or max(ratio, 1 / ratio) > params.max_sigma_ratio:
            wrong.append(row)
        elif shift > 0.1 or max(ratio, 1 / ratio) > 1.1:
            job.warn(f"preprocessing.json fits the training data loosely: {_side_by_side(row)}")
    if wrong:
        raise InputError(
            "preprocessing.json: mu and sigma are not those of the training split, in units after "
            f"scaling ({len(wrong)} of {len(rows)} bands): "
            + "; ".join(_side_by_side(row) for row in wrong[:3])
            + (" ..." if len(wrong) > 3 else "")
        )


def _side_by_side(row: dict[str, Any]) -> str:
    return (
        f"{row['modality']} band {row['band']}: mu {row['mu_contract']:g} against "
        f"{row['mu_data']:.5g} in the data, sigma {row['sigma_contract']:g} against "
        f"{row['sigma_data']:.5g}"
    )


def _write_dataset(
    job: Job, contract: Contract, student: StudentInput, splits: dict[str, Split]
) -> dict[str, Any]:
    """Store every split as 8-bit images: what the device will get is what the student trains on."""
    import numpy as np

    from pipeline.datasets import class_histogram
    from preprocessing.apply import encode

    folder = job.outputs["dataset"]
    summary: dict[str, Any] = {"contract": contract.sha256, "splits": {}}
    for name, split in splits.items():
        (folder / name).mkdir(parents=True)
        shape = (len(split), *student.patch_hw, len(student.bands))
        images = np.lib.format.open_memmap(
            folder / name / "images.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        with job.progress(f"images {name}", len(split)) as bar:
            for start in range(0, len(split), BLOCK):
                patches = split.source.read(student.modality, split.rows[start : start + BLOCK])
                images[start : start + len(patches)] = encode(patches, contract, student)
                bar.update(len(patches))
        images.flush()
        np.save(folder / name / "labels.npy", split.labels)
        np.save(folder / name / "rows.npy", split.rows)
        summary["splits"][name] = {
            "patches": len(split),
            "classes": class_histogram(split.labels, len(contract.labels)),
        }
    (folder / "dataset.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _label(
    job: Job, contract: Contract, teachers: list[Teacher], splits: dict[str, Split]
) -> dict[str, Any]:
    """Run the ensemble on val, to know how good it is, and on train, to keep its logits."""
    import numpy as np

    from pipeline.metrics import top1
    from pipeline.teachers import ensemble_logits, gives_probabilities

    val = _outputs(job, contract, teachers, splits["val"], [False] * len(teachers))
    probabilities = [gives_probabilities(outputs) for outputs in val]
    for teacher, found in zip(teachers, probabilities, strict=True):
        if found:
            job.warn(
                f"{teacher.path.name} ends in a softmax: its output is taken as probabilities, and "
                "their logarithm as logits, which is the same at every temperature"
            )
    logits = [_logits(o, p) for o, p in zip(val, probabilities, strict=True)]
    weights = [teacher.weight for teacher in teachers]
    together = ensemble_logits(logits, weights)
    train = _outputs(job, contract, teachers, splits["train"], probabilities)
    np.save(job.outputs["teacher_logits"], ensemble_logits(train, weights))
    labels = splits["val"].labels
    return {
        "members": [
            {
                "name": teacher.name,
                "modality": teacher.modality,
                "bands": list(teacher.bands),
                "weight": teacher.weight,
                "opset": teacher.opset,
                "batch": teacher.batch,
                "output": "probabilities" if found else "logits",
                "top1_val": top1(out, labels),
            }
            for teacher, found, out in zip(teachers, probabilities, logits, strict=True)
        ],
        "rule": "weighted mean of logits",
        "top1_val": top1(together, labels),
        "measured_on": "host-float",
        "n_val": len(labels),
        "logit_mean": float(together.mean()),
        "logit_std": float(together.std()),
    }


def _outputs(
    job: Job, contract: Contract, teachers: list[Teacher], split: Split, probabilities: list[bool]
) -> list[NDArray[np.float32]]:
    import numpy as np

    results = []
    with job.progress(f"teachers on {split.name}", len(split) * len(teachers)) as bar:
        for teacher, found in zip(teachers, probabilities, strict=True):
            outputs = np.empty((len(split), len(contract.labels)), np.float32)
            for start in range(0, len(split), BLOCK):
                patches = split.source.read(teacher.modality, split.rows[start : start + BLOCK])
                outputs[start : start + len(patches)] = teacher.raw(patches, contract)
                bar.update(len(patches))
            results.append(_logits(outputs, found))
    return results


def _logits(outputs: NDArray[np.float32], probabilities: bool) -> NDArray[np.float32]:
    from pipeline.teachers import to_logits

    return to_logits(outputs, probabilities)


STAGE = Stage(
    inputs=(),
    outputs={
        "contract": "preprocessing.json",
        "labels": "labels.txt",
        "student_input": "student_input.json",
        "dataset": "dataset",
        "teacher_logits": "teacher_logits.npy",
    },
    params=IngestParams,
    run=run,
    sources=sources,
    tools=lambda params: ("onnxruntime",),
)
