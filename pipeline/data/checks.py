"""Checks of contract, labels, bands and patches against each other, before anything is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pipeline.facts import BandFacts, LeakFacts
from pipeline.params.ingest import IngestParams, StudentParams
from pipeline.params.sources import TeacherParams
from pipeline.run.errors import InputError
from pipeline.run.stage import Job

if TYPE_CHECKING:
    from pipeline.data.splits import Split
    from pipeline.data.survey import BandStatistics, Survey
    from preprocessing.contract import Contract


def check_sizes(params: IngestParams, train: Split) -> None:
    """A view moves the pixels of every modality the same way, so their grids must be equal."""
    sizes = {m: train.source.shape(m)[:2] for m in seen_bands(params)}
    if params.views.count > 1 and len(set(sizes.values())) > 1:
        raise InputError(
            "ingest.views: the modalities have patches of different sizes ("
            + ", ".join(f"{m} {h}x{w}" for m, (h, w) in sizes.items())
            + "); set views.count: 1"
        )


def check_band_counts(params: IngestParams, splits: dict[str, Split]) -> None:
    """All splits have the bands of train: mu and sigma have one entry for each."""
    train = splits["train"].source
    for modality in seen_bands(params):
        for source in (split.source for split in splits.values()):
            found, wanted = (s.shape(modality)[2] for s in (source, train))
            if found != wanted:
                raise InputError(
                    f"{source.path.name}: modality {modality!r} has {found} bands, but "
                    f"{train.path.name} has {wanted}"
                )


def check_labels_file(job: Job, contract: Contract) -> None:
    """The file of labels, where there is one, names the contract's classes in the same order."""
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


def seen_bands(params: IngestParams) -> dict[str, list[int]]:
    """By modality, the bands that a teacher or the student sees, ascending."""
    seen: dict[str, set[int]] = {}
    viewers: list[TeacherParams | StudentParams] = [*params.teachers, params.student]
    for viewer in viewers:
        seen.setdefault(viewer.modality, set()).update(viewer.bands)
    return {modality: sorted(bands) for modality, bands in seen.items()}


def drop_bad_patches(
    job: Job,
    params: IngestParams,
    contract: Contract,
    splits: dict[str, Split],
    surveys: dict[str, Survey],
) -> dict[str, Split]:
    """The splits without patches that hold NaN or infinity; refused unless the user allows it."""
    from pipeline.data.splits import check_classes

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


def report_leaks(
    job: Job, params: IngestParams, surveys: dict[str, Survey]
) -> tuple[LeakFacts, ...]:
    """Patches that two splits share, as facts, each told as a warning."""
    from pipeline.data.survey import find_leaks

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
    return msgspec.convert(leaks, tuple[LeakFacts, ...], from_attributes=True)


def judge_statistics(
    job: Job,
    params: IngestParams,
    contract: Contract,
    statistics: dict[str, BandStatistics],
    train: Split,
) -> None:
    """Refuse a contract whose mu and sigma are of other data, another scale or other bands."""
    rows = band_table(contract, statistics, train)
    wrong = []
    for row in rows:
        if row.mu_contract is None or row.sigma_contract is None:
            continue
        sigma = row.sigma_data
        if sigma == 0:
            raise InputError(
                f"{row.modality} band {row.band} is constant ({row.mu_data:g}) over the "
                "whole training split; it carries nothing"
            )
        shift = abs(row.mu_contract - row.mu_data) / sigma
        ratio = row.sigma_contract / sigma
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


def band_table(
    contract: Contract, statistics: dict[str, BandStatistics], train: Split
) -> tuple[BandFacts, ...]:
    """Per band: range of the stored values; mean and sigma of the data beside the contract's."""
    rows = []
    for modality, found in statistics.items():
        zscore = contract.bind(modality, found.bands, train.source.shape(modality)[2]).zscore
        for i, band in enumerate(found.bands):
            rows.append(
                BandFacts(
                    modality=modality,
                    band=band,
                    minimum=float(found.minimum[i]),
                    maximum=float(found.maximum[i]),
                    mu_contract=zscore.mu[i] if zscore else None,
                    mu_data=float(found.mean[i]),
                    sigma_contract=zscore.sigma[i] if zscore else None,
                    sigma_data=float(found.sigma[i]),
                )
            )
    return tuple(rows)


def _side_by_side(row: BandFacts) -> str:
    return (
        f"{row.modality} band {row.band}: mu {row.mu_contract:g} against {row.mu_data:.5g} in the "
        f"data, sigma {row.sigma_contract:g} against {row.sigma_data:.5g}"
    )
