"""Check teachers, contract and data against each other; store what the later stages need."""

from __future__ import annotations

import glob
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from metis.device_constants import exact_range
from pipeline.sources import Bands, DataParams, TeacherParams, ViewParams
from pipeline.stage import Facts, InputError, Job, Stage, path_field, require_extra
from preprocessing.contract import StudentInput, ZScore, linear_encoding, load_contract

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.sources import SplitParams
    from pipeline.splits import Split
    from pipeline.survey import BandStatistics, Survey
    from pipeline.teachers import Teacher
    from preprocessing.contract import Contract

#: An encoding that gives the middle 98 % of a band fewer grey levels than this, or less than this
#: many dB, costs accuracy; `percentile` is recommended instead.
FEW_LEVELS = 48
LOW_SQNR_DB = 30.0

#: A patch of which the encoding cuts more than this share has lost its values.
_MOST = 0.5

#: Endings of files that hold weights and no graph.
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class StudentParams:
    """What the student sees, and how the device delivers it."""

    bands: Bands  # that it sees, in channel order
    modality: str = "optical"
    size: Annotated[int, Meta(ge=1)] = 32  # height and width of the network's input
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    half_pixel_centers: bool | None = None  # null: true for bilinear, false for nearest
    device_resize: Literal["auto", "none", "device"] = "auto"  # none: images have the size already
    encoding: Literal["contract", "percentile"] = (
        "contract"  # which values grey 0 and 255 stand for
    )
    percentiles: tuple[
        Annotated[float, Meta(ge=0, lt=50)], Annotated[float, Meta(gt=50, le=100)]
    ] = (0.1, 99.9)  # of each band, for encoding percentile


@dataclass(frozen=True)
class IngestParams:
    """What to take in."""

    data: DataParams
    teachers: Annotated[tuple[TeacherParams, ...], Meta(min_length=1)]
    student: StudentParams
    contract: str = path_field("preprocessing.json")
    labels: str | None = path_field(None)  # text, one class per line; must equal the contract's
    combine: Literal["mean_logits", "mean_probabilities"] = "mean_logits"  # weighted
    calibrate_temperatures: bool = False  # divide each teacher's logits by its own, fitted on val
    views: ViewParams = field(default_factory=ViewParams)
    teacher_mode: Literal["cached", "live"] = "cached"  # live: distill asks them for every batch
    max_top1_difference: Annotated[float, Meta(gt=0)] = 0.005  # from a teacher's recorded_top1
    max_logit_difference: Annotated[float, Meta(gt=0)] = 0.1  # from recorded mean and std, in stds
    doubtful_top1: Annotated[float, Meta(ge=0, le=1)] = 0.5  # below it, other conventions are tried
    max_mean_shift: Annotated[float, Meta(gt=0)] = 0.5  # of mu from the data's, in data sigmas
    max_sigma_ratio: Annotated[float, Meta(gt=1)] = 1.5  # of sigma to the data's, either way


def sources(params: IngestParams, root: Path) -> dict[str, Path]:
    """The contract, the labels, every data file or folder, every teacher that a pattern matches."""
    found = {"contract": root / params.contract}
    if params.labels is not None:
        found["labels"] = root / params.labels
    for name, split in params.data.splits.items():
        for key in ("path", "labels", "indices"):
            value = getattr(split, key)
            if value is not None:
                found[f"data.{name}" if key == "path" else f"data.{name}.{key}"] = root / value
    for i, teacher in enumerate(params.teachers):
        if teacher.path is None:
            continue
        if not glob.has_magic(teacher.path):
            found[f"teachers[{i}]"] = root / teacher.path
            continue
        folder, _, pattern = teacher.path.rpartition("/")
        for j, match in enumerate(sorted((root / folder).glob(pattern))):
            found[f"teachers[{i}].{j}"] = match
    return found


def ready(params: IngestParams) -> None:
    """Each split is described one way, each teacher has its weights."""
    for name, split in params.data.splits.items():
        _ready_split(params.data.format, name, split)
    for i, teacher in enumerate(params.teachers):
        if teacher.path is None and teacher.timm is None:
            raise InputError(f"ingest.teachers[{i}].path is missing: name the teacher's ONNX file")
        if teacher.timm is not None:
            require_extra("train", "torch", "timm")
        elif teacher.path and teacher.path.endswith(WEIGHTS):
            raise InputError(
                f"ingest.teachers[{i}]: {teacher.path} holds weights without their network; name "
                "it with timm: NAME, or export the teacher to ONNX"
            )
    student = params.student
    if student.device_resize == "device" and student.interpolation == "nearest":
        raise InputError(
            "ingest.student: the device resizes bilinear whatever its pipeline says; with nearest "
            "use device_resize none (images are exported at the network's size)"
        )


def _ready_split(format: str, name: str, split: SplitParams) -> None:
    where = f"ingest.data.{name}"
    if split.fraction is not None and (split.path or split.rows or split.indices):
        raise InputError(f"{where}: fraction takes from train; it goes without path and rows")
    if split.fraction is not None and name == "train":
        raise InputError(f"{where}: give the training split a path; others may be fractions")
    if split.fraction is None and split.path is None:
        raise InputError(f"{where}.path is missing: name the file of the {name} split")
    if split.rows and split.indices:
        raise InputError(f"{where}: rows and indices both say which rows; keep one")
    needs_labels = format == "npy" and name != "unlabeled"
    if needs_labels and split.path and split.labels is None:
        raise InputError(f"{where}.labels: format npy keeps labels in a file of their own; name it")
    if not needs_labels and split.labels is not None:
        why = "nobody looks at them" if name == "unlabeled" else f"format {format} has them inside"
        raise InputError(f"{where}.labels: {why}; leave this out")


def run(job: Job, params: IngestParams) -> Facts:
    """Check everything, then write images, labels and the ensemble's answers."""
    from pipeline.ask_teachers import teach  # onnxruntime
    from pipeline.splits import class_histogram  # numpy, h5py
    from pipeline.survey import rows_elsewhere  # numpy

    contract = load_contract(job.sources["contract"])
    _check_labels_file(job, contract)
    splits, teachers, threads = _opened(job, params, contract)
    surveys = _survey(job, params, contract, splits)
    splits = _without_bad(job, params, contract, splits, surveys)
    leaks = _report_leaks(job, params, surveys)
    statistics = surveys["train"].statistics
    _judge_statistics(job, params, contract, statistics, splits["train"])

    student, quality = _student_input(job, params.student, contract, statistics, splits["train"])
    facts = teach(job, params, contract, teachers, splits)
    unfit = {"elsewhere": rows_elsewhere(surveys).tolist()}
    for name, split in splits.items():
        folder = job.outputs["test_set"] if name == "test" else job.outputs["dataset"] / name
        outside = _write_split(job, contract, student, split, folder)
        if name == "train":
            unfit["outside"] = outside
    job.outputs["unfit"].write_text(json.dumps(unfit) + "\n")
    shutil.copyfile(job.sources["contract"], job.outputs["contract"])
    job.outputs["labels"].write_text("".join(f"{label}\n" for label in contract.labels))
    job.outputs["student_input"].write_text(student.to_json())
    synthetic = sorted({s.source.synthetic for s in splits.values() if s.source.synthetic})
    described: dict[str, dict[str, Any]] = {
        name: {
            "patches": len(split),
            "classes": class_histogram(split.labels, len(contract.labels)),
            "bad_patches_dropped": len(surveys[name].bad),
        }
        for name, split in splits.items()
    }
    # Without a word of the test split: nothing that is made may depend on it.
    known = {name: found for name, found in described.items() if name != "test"}
    summary = {"contract": contract.sha256, "synthetic": synthetic, "splits": known}
    (job.outputs["dataset"] / "dataset.json").write_text(json.dumps(summary, indent=1) + "\n")
    return {
        "synthetic": synthetic,
        "splits": described,
        "leaks": leaks,
        "bands": _band_table(contract, statistics, splits["train"]),
        "student_input": asdict(student),
        "encoding": quality,
        "teachers": {**facts, "threads": threads},
        "views": asdict(params.views),
    }


def label_shard(
    job: Job, params: IngestParams, shard: tuple[int, int] | None
) -> list[tuple[str, int, int]]:
    """Ask the teachers about a part of the blocks, and keep their answers for `run`.

    Args:
        job: outside a run.
        params: the section `ingest`.
        shard: (i, n): every n-th block, from the i-th on; None: only look.

    Returns:
        Per split: its name, how many blocks are still missing, of how many.
    """
    from pipeline.ask_teachers import labelling, needed_views

    contract = load_contract(job.sources["contract"])
    splits, teachers, _ = _opened(job, params, contract)
    splits = _without_bad(job, params, contract, splits, _survey(job, params, contract, splits))
    asked = labelling(job, params, contract, teachers)
    found = []
    for name, views in needed_views(params, splits).items():
        digest = params.data.reading(job.digest(splits[name].source.path))
        if shard is not None:
            with job.progress(f"teachers, {name}", len(splits[name]) // shard[1]) as bar:
                asked.label(splits[name], digest, views, shard=shard, done=bar.update)
        found.append((name, *asked.missing(splits[name], digest, views)))
    return found


def _opened(
    job: Job, params: IngestParams, contract: Contract
) -> tuple[dict[str, Split], list[Teacher], str]:
    """Splits, teachers, and in words how onnxruntime runs them."""
    from pipeline.splits import open_splits  # numpy, h5py

    splits = open_splits(params.data, job.sources, contract.labels, job.seed)
    _check_sizes(params, splits["train"])
    _check_band_counts(params, splits)
    teachers, threads = _open_teachers(job, params, contract, splits["train"])
    return _cached(job, params, splits), teachers, threads


def _check_sizes(params: IngestParams, train: Split) -> None:
    """A view moves the pixels of every modality the same way, so their grids must be equal."""
    sizes = {m: train.source.shape(m)[:2] for m in _seen_bands(params)}
    if params.views.count > 1 and len(set(sizes.values())) > 1:
        raise InputError(
            "ingest.views: the modalities have patches of different sizes ("
            + ", ".join(f"{m} {h}x{w}" for m, (h, w) in sizes.items())
            + "); set views.count: 1"
        )


def _check_band_counts(params: IngestParams, splits: dict[str, Split]) -> None:
    """All splits have the bands of train: mu and sigma have one entry for each."""
    train = splits["train"].source
    for modality in _seen_bands(params):
        for source in (split.source for split in splits.values()):
            found, wanted = (s.shape(modality)[2] for s in (source, train))
            if found != wanted:
                raise InputError(
                    f"{source.path.name}: modality {modality!r} has {found} bands, but "
                    f"{train.path.name} has {wanted}"
                )


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


def _open_teachers(
    job: Job, params: IngestParams, contract: Contract, train: Split
) -> tuple[list[Teacher], str]:
    """The teachers, and in words how onnxruntime shares the processor among its threads."""
    from pipeline.teachers import open_teachers  # onnxruntime

    names, wanted = [], []
    for i, given in enumerate(params.teachers):
        key = f"teachers[{i}]"
        files: dict[str, Path | None] = {
            n: p for n, p in job.sources.items() if n == key or n.startswith(f"{key}.")
        }
        if given.path is None:
            files = {key: None}
        if not files:
            raise InputError(f"ingest.{key}.path: no file matches {given.path!r}")
        names += list(files)
        bands_in_data = train.source.shape(given.modality)[2]
        wanted += [(path, given, bands_in_data) for path in files.values()]
    teachers, threads = open_teachers(wanted, contract)
    for name, teacher in zip(names, teachers, strict=True):
        for file in teacher.files[1:]:
            job.also_read(name, file)
    called = [teacher.name for teacher in teachers]
    for name in called:
        if called.count(name) > 1:
            raise InputError(f"two teachers are called {name}; rename one file")
    return teachers, str(threads or "torch's own threads")


def _seen_bands(params: IngestParams) -> dict[str, list[int]]:
    """By modality, the bands that a teacher or the student sees, ascending."""
    seen: dict[str, set[int]] = {}
    viewers: list[TeacherParams | StudentParams] = [*params.teachers, params.student]
    for viewer in viewers:
        seen.setdefault(viewer.modality, set()).update(viewer.bands)
    return {modality: sorted(bands) for modality, bands in seen.items()}


def _cached(job: Job, params: IngestParams, splits: dict[str, Split]) -> dict[str, Split]:
    """With `data.cache`, the same splits over memory-mapped copies of the bands that are needed."""
    if not params.data.cache:
        return splits
    from pipeline.datasets import cached
    from pipeline.survey import BLOCK

    copies = {}
    for split in splits.values():
        path = split.source.path
        if path not in copies:
            bands = _seen_bands(params)
            digest = params.data.reading(job.digest(path))
            copies[path] = cached(split.source, bands, digest, job.cache, BLOCK)
    return {
        name: replace(split, source=copies[split.source.path]) for name, split in splits.items()
    }


def _survey(
    job: Job, params: IngestParams, contract: Contract, splits: dict[str, Split]
) -> dict[str, Survey]:
    from pipeline.survey import survey

    bands = _seen_bands(params)
    for modality, some in bands.items():
        for split in splits.values():
            contract.statistics(modality, some, split.source.shape(modality)[2])
    surveys = {}
    for name, split in splits.items():
        with job.progress(f"survey {name}", len(split)) as bar:
            surveys[name] = survey(split, bands, contract, bar.update)
    return surveys


def _without_bad(
    job: Job,
    params: IngestParams,
    contract: Contract,
    splits: dict[str, Split],
    surveys: dict[str, Survey],
) -> dict[str, Split]:
    from pipeline.splits import check_classes

    for name, found in surveys.items():
        if not len(found.bad):
            continue
        file = splits[name].source.path.name
        rows = ", ".join(map(str, found.bad[:5])) + (", ..." if len(found.bad) > 5 else "")
        words = f"{file}: {len(found.bad)} patches of {name} have NaN or infinity, in rows {rows}"
        if params.data.bad_patches == "error":
            raise InputError(f"{words}; repair them, or set ingest.data.bad_patches: drop")
        job.warn(f"{words}; dropped")
    kept = {name: split.without(surveys[name].bad) for name, split in splits.items()}
    check_classes(kept["train"], len(contract.labels))
    return kept


def _report_leaks(
    job: Job, params: IngestParams, surveys: dict[str, Survey]
) -> list[dict[str, Any]]:
    from pipeline.survey import find_leaks

    leaks = find_leaks(surveys)
    for leak in leaks:
        rows = ", ".join(f"{a} = {b}" for a, b in leak.pairs)
        words = (
            f"{leak.count} patches of {leak.one} are in {leak.other} too (row of {leak.one} = row "
            f"of {leak.other}): {rows}" + (", ..." if leak.count > len(leak.pairs) else "")
        )
        if params.data.on_leak == "error":
            raise InputError(f"{words}; remove them, or set ingest.data.on_leak: warn")
        job.warn(words)
    return [asdict(leak) for leak in leaks]


def _judge_statistics(
    job: Job,
    params: IngestParams,
    contract: Contract,
    statistics: dict[str, BandStatistics],
    train: Split,
) -> None:
    """Refuse a contract whose mu and sigma are of other data, another scale or other bands."""
    rows = _band_table(contract, statistics, train)
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


def _band_table(
    contract: Contract, statistics: dict[str, BandStatistics], train: Split
) -> list[dict[str, Any]]:
    """Per band: range of the stored values; mean and sigma of the data beside the contract's."""
    rows = []
    for modality, found in statistics.items():
        given = contract.statistics(modality, found.bands, train.source.shape(modality)[2])
        for i, band in enumerate(found.bands):
            rows.append(
                {
                    "modality": modality,
                    "band": band,
                    "minimum": float(found.minimum[i]),
                    "maximum": float(found.maximum[i]),
                    "mu_contract": given.mu[i] if given else None,
                    "mu_data": float(found.mean[i]),
                    "sigma_contract": given.sigma[i] if given else None,
                    "sigma_data": float(found.sigma[i]),
                }
            )
    return rows


def _side_by_side(row: dict[str, Any]) -> str:
    return (
        f"{row['modality']} band {row['band']}: mu {row['mu_contract']:g} against "
        f"{row['mu_data']:.5g} in the data, sigma {row['sigma_contract']:g} against "
        f"{row['sigma_data']:.5g}"
    )


def _student_input(
    job: Job,
    params: StudentParams,
    contract: Contract,
    statistics: dict[str, BandStatistics],
    train: Split,
) -> tuple[StudentInput, list[dict[str, Any]]]:
    """The student's input, and per channel how well its 8-bit encoding carries the band."""
    from pipeline.survey import encoding_quality

    height, width, bands_in_data = train.source.shape(params.modality)
    zscore = contract.statistics(params.modality, params.bands, bands_in_data)
    found = statistics[params.modality]
    samples = [found.sample[:, found.bands.index(band)] for band in params.bands]
    dst_range = contract.scaling_of(params.modality).dst_range
    ranges = [dst_range] * len(params.bands)
    if params.encoding == "percentile":
        ranges = _fitted_ranges(params, zscore, samples)
    bilinear = params.interpolation == "bilinear"
    same_size = (height, width) == (params.size, params.size)
    student = StudentInput(
        modality=params.modality,
        bands=params.bands,
        patch_hw=(height, width),
        size_hw=(params.size, params.size),
        interpolation=params.interpolation,
        half_pixel_centers=bilinear
        if params.half_pixel_centers is None
        else params.half_pixel_centers,
        device_resize=not same_size
        and (params.device_resize == "device" or (params.device_resize == "auto" and bilinear)),
        encoding=params.encoding,
        contract=contract.sha256,
        **linear_encoding(ranges, zscore),
    )
    quality = []
    for band, sample, (lo, hi) in zip(params.bands, samples, ranges, strict=True):
        found_quality = encoding_quality(sample, lo, hi)
        levels, sqnr = found_quality.levels98, found_quality.sqnr_db
        quality.append({"band": band, "grey_lo": lo, "grey_hi": hi, **asdict(found_quality)})
        low = sqnr is not None and (levels < FEW_LEVELS or sqnr < LOW_SQNR_DB)
        if params.encoding == "contract" and low:
            job.warn(
                f"8-bit encoding: the middle 98 % of {params.modality} band {band} use "
                f"{levels:.0f} grey levels ({sqnr:.1f} dB); ingest.student.encoding: percentile "
                "would use most of 256"
            )
    return student, quality


def _fitted_ranges(
    params: StudentParams, zscore: ZScore | None, samples: Sequence[NDArray[np.float32]]
) -> list[tuple[float, float]]:
    """Per band, percentiles of the training split, widened so that the device's constants fit."""
    import numpy as np

    ranges = []
    for i, (band, sample) in enumerate(zip(params.bands, samples, strict=True)):
        low, high = (float(v) for v in np.percentile(sample, params.percentiles))
        if low >= high:
            raise InputError(
                f"ingest.student.percentiles: {params.percentiles} of {params.modality} band "
                f"{band} are both {low:g}; widen them"
            )
        # Without z-score the network sees contract units: mean 0, standard deviation 1.
        mu, sigma = (zscore.mu[i], zscore.sigma[i]) if zscore else (0.0, 1.0)
        ranges.append(exact_range(mu, sigma, low, high))
    return ranges


def _write_split(
    job: Job, contract: Contract, student: StudentInput, split: Split, folder: Path
) -> list[int]:
    """Store a split as the 8-bit images that the device receives, with labels and rows.

    Returns:
        Rows of patches of which the encoding cuts most values.
    """
    import numpy as np

    from pipeline.prefetch import prefetched
    from pipeline.survey import BLOCK
    from preprocessing.apply import encode, share_outside

    folder.mkdir(parents=True)
    shape = (len(split), *student.patch_hw, len(student.bands))
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape
    )
    np.save(folder / "labels.npy", split.labels)
    np.save(folder / "rows.npy", split.rows)
    scaling = contract.scaling_of(student.modality)
    reading = (
        (start, split.source.read(student.modality, rows, student.bands))
        for start, rows in (
            (start, split.rows[start : start + BLOCK]) for start in range(0, len(split), BLOCK)
        )
    )
    outside: list[int] = []
    with job.progress(f"images, {split.name}", len(split)) as bar:
        for start, patches in prefetched(reading):
            encoded = encode(patches, scaling, student)
            images[start : start + len(patches)] = encoded
            ends = np.flatnonzero(np.isin(encoded, (0, 255)).mean(axis=(1, 2, 3)) > _MOST)
            cut = ends[share_outside(patches[ends], scaling, student) > _MOST]
            outside += split.rows[start + cut].tolist()
            bar.update(len(patches))
    images.flush()
    return outside


STAGE = Stage(
    inputs=(),
    outputs={
        "contract": "preprocessing.json",
        "labels": "labels.txt",
        "student_input": "student_input.json",
        "dataset": "dataset",
        "test_set": "test_set",
        "teaching": "teaching",
        "unfit": "unfit_for_calibration.json",
    },
    params=IngestParams,
    run=run,
    sources=sources,
    ready=ready,
    tools=lambda params: ("onnxruntime",),
    code_version=3,
)
