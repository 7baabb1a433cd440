"""Checks of contract, labels, bands and patches against each other, before anything is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pipeline.data.blocks import bands_by_modality
from pipeline.data.splits import check_classes
from pipeline.data.survey import find_leaks
from pipeline.facts import BandFacts, LeakFacts
from pipeline.params.ingest import IngestParams
from pipeline.run.errors import InputError
from pipeline.run.stage import Job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.data.splits import Split
    from pipeline.data.survey import BandStatistics, Survey
    from preprocessing.contract import Channels, Contract


def check_sizes(params: IngestParams, train: Split) -> None:
    """A view moves the pixels of every modality the same way, so their grids must be equal."""
    sizes = {m: train.source.shape(m)[:2] for m in bands_by_modality(params.viewers)}
    if params.views.count > 1 and len(set(sizes.values())) > 1:
        raise InputError(
            "ingest.views: the modalities have patches of different sizes ("
            + ", ".join(f"{m} {h}x{w}" for m, (h, w) in sizes.items())
            + "); set views.count: 1"
        )


def check_band_counts(params: IngestParams, splits: dict[str, Split]) -> None:
    """All splits have the bands of train: mu and sigma have one entry for each."""
    train = splits["train"].source
    for modality in bands_by_modality(params.viewers):
        for source in (split.source for split in splits.values()):
            bands, bands_of_train = source.shape(modality)[2], train.shape(modality)[2]
            if bands != bands_of_train:
                raise InputError(
                    f"{source.path.name}: modality {modality!r} has {bands} bands, but "
                    f"{train.path.name} has {bands_of_train}"
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


def drop_bad_patches(
    job: Job,
    params: IngestParams,
    splits: Mapping[str, Split],
    surveys: Mapping[str, Survey],
    classes: int,
) -> dict[str, Split]:
    """The splits without patches that hold NaN or infinity; refused unless the user allows it."""
    for name, survey in surveys.items():
        if not len(survey.bad):
            continue
        file = splits[name].source.path.name
        rows = ", ".join(map(str, survey.bad[:5])) + (", ..." if len(survey.bad) > 5 else "")
        message = (
            f"{file}: {len(survey.bad)} patches of {name} have NaN or infinity, in rows {rows}"
        )
        if params.data.bad_patches == "error":
            raise InputError(f"{message}; repair them, or set ingest.data.bad_patches: drop")
        job.warn(f"{message}; dropped")
    good = {name: split.without(surveys[name].bad) for name, split in splits.items()}
    check_classes(good["train"], classes)
    return good


def report_leaks(
    job: Job, params: IngestParams, surveys: Mapping[str, Survey]
) -> tuple[LeakFacts, ...]:
    """Patches that two splits share, as facts, each told as a warning."""
    leaks = find_leaks(surveys)
    for leak in leaks:
        rows = ", ".join(f"{first} = {second}" for first, second in leak.pairs)
        message = (
            f"{leak.count} patches of {leak.one} are in {leak.other} too (row of {leak.one} = row "
            f"of {leak.other}): {rows}" + (", ..." if leak.count > len(leak.pairs) else "")
        )
        if params.data.on_leak == "error":
            raise InputError(f"{message}; remove them, or set ingest.data.on_leak: warn")
        job.warn(message)
    return msgspec.convert(leaks, tuple[LeakFacts, ...], from_attributes=True)


def judge_statistics(job: Job, params: IngestParams, bands: Sequence[BandFacts]) -> None:
    """Refuse a contract whose mu and sigma are of other data, another scale or other bands."""
    wrong = []
    for band in bands:
        if band.mu_contract is None or band.sigma_contract is None:
            continue
        sigma = band.sigma_data
        if sigma == 0:
            raise InputError(
                f"{band.modality} band {band.band} is constant ({band.mu_data:g}) over the "
                "whole training split; it carries nothing"
            )
        shift = abs(band.mu_contract - band.mu_data) / sigma
        ratio = band.sigma_contract / sigma
        if shift > params.max_mean_shift or max(ratio, 1 / ratio) > params.max_sigma_ratio:
            wrong.append(band)
        elif shift > 0.1 or max(ratio, 1 / ratio) > 1.1:
            job.warn(f"preprocessing.json fits the training data loosely: {_side_by_side(band)}")
    if wrong:
        raise InputError(
            "preprocessing.json: mu and sigma are not those of the training split, in units after "
            f"scaling ({len(wrong)} of {len(bands)} bands): "
            + "; ".join(_side_by_side(band) for band in wrong[:3])
            + (" ..." if len(wrong) > 3 else "")
        )


def band_table(
    channels: Mapping[str, Channels], statistics: Mapping[str, BandStatistics]
) -> tuple[BandFacts, ...]:
    """Per band: range of the stored values; mean and sigma of the data beside the contract's.

    Args:
        channels: by modality, the bands that somebody sees.
        statistics: by modality, of the same bands in the training split.
    """
    return tuple(
        BandFacts(
            modality=modality,
            band=band,
            minimum=float(statistics[modality].minimum[i]),
            maximum=float(statistics[modality].maximum[i]),
            mu_contract=bound.zscore.mu[i] if bound.zscore else None,
            mu_data=float(statistics[modality].mean[i]),
            sigma_contract=bound.zscore.sigma[i] if bound.zscore else None,
            sigma_data=float(statistics[modality].sigma[i]),
        )
        for modality, bound in channels.items()
        for i, band in enumerate(bound.bands)
    )


def _side_by_side(band: BandFacts) -> str:
    return (
        f"{band.modality} band {band.band}: mu {band.mu_contract:g} against {band.mu_data:.5g} in "
        f"the data, sigma {band.sigma_contract:g} against {band.sigma_data:.5g}"
    )
