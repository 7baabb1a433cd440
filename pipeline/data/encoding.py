"""The student's 8-bit encoding: chosen, judged and written."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from metis.voyager.device_constants import exact_range
from pipeline.facts import EncodingFacts
from pipeline.params.ingest import StudentParams
from pipeline.run.errors import InputError
from pipeline.run.stage import Job
from preprocessing.contract import ZScore
from preprocessing.student_input import StudentInput, linear_encoding

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.data.splits import Split
    from pipeline.data.survey import BandStatistics
    from preprocessing.contract import Contract


#: An encoding that gives the middle 98 % of a band fewer grey levels than this, or less than this
#: many dB, costs accuracy; `percentile` is recommended instead.
FEW_LEVELS = 48

LOW_SQNR_DB = 30.0

#: A patch of which the encoding cuts more than this share has lost its values.
_MOST = 0.5


def choose_student_input(
    job: Job,
    params: StudentParams,
    contract: Contract,
    statistics: dict[str, BandStatistics],
    train: Split,
) -> tuple[StudentInput, tuple[EncodingFacts, ...]]:
    """The student's input, and per channel how well its 8-bit encoding carries the band."""
    height, width, bands_in_data = train.source.shape(params.modality)
    channels = contract.bind(params.modality, params.bands, bands_in_data)
    found = statistics[params.modality]
    samples = [found.sample[:, found.bands.index(band)] for band in params.bands]
    ranges = [channels.scaling.dst_range] * len(params.bands)
    if params.encoding == "percentile":
        ranges = _fitted_ranges(params, channels.zscore, samples)
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
        **linear_encoding(ranges, channels),
    )
    quality = []
    for band, sample, (lo, hi) in zip(params.bands, samples, ranges, strict=True):
        found_quality = encoding_quality(sample, lo, hi)
        levels, sqnr = found_quality.levels98, found_quality.sqnr_db
        quality.append(EncodingFacts(band, lo, hi, *astuple(found_quality)))
        low = sqnr is not None and (levels < FEW_LEVELS or sqnr < LOW_SQNR_DB)
        if params.encoding == "contract" and low:
            job.warn(
                f"8-bit encoding: the middle 98 % of {params.modality} band {band} use "
                f"{levels:.0f} grey levels ({sqnr:.1f} dB); ingest.student.encoding: percentile "
                "would use most of 256"
            )
    return student, tuple(quality)


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


def write_split(
    job: Job, contract: Contract, student: StudentInput, split: Split, folder: Path
) -> list[int]:
    """Store a split as the 8-bit images that the device receives, with labels and rows.

    Returns:
        Rows of patches of which the encoding cuts most values.
    """
    import numpy as np

    from pipeline.data.prefetch import prefetched
    from pipeline.data.survey import BLOCK
    from preprocessing.apply import encode, share_outside

    folder.mkdir(parents=True)
    shape = (len(split), *student.patch_hw, len(student.bands))
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape
    )
    np.save(folder / "labels.npy", split.labels)
    np.save(folder / "rows.npy", split.rows)
    channels = contract.bind(
        student.modality, student.bands, split.source.shape(student.modality)[2]
    )
    reading = (
        (start, split.source.read(student.modality, rows, student.bands))
        for start, rows in (
            (start, split.rows[start : start + BLOCK]) for start in range(0, len(split), BLOCK)
        )
    )
    outside: list[int] = []
    with job.progress(f"images, {split.name}", len(split)) as bar:
        for start, patches in prefetched(reading):
            encoded = encode(patches, channels, student)
            images[start : start + len(patches)] = encoded
            ends = np.flatnonzero(np.isin(encoded, (0, 255)).mean(axis=(1, 2, 3)) > _MOST)
            cut = ends[share_outside(patches[ends], channels, student) > _MOST]
            outside += split.rows[start + cut].tolist()
            bar.update(len(patches))
    images.flush()
    return outside


@dataclass(frozen=True)
class EncodingQuality:
    """How well an 8-bit encoding carries one band."""

    levels98: float  # grey levels between the 1st and the 99th percentile
    sqnr_db: float | None  # variance over the mean square of the encoding's error; None: no error
    clipped: float  # fraction of values beyond the ends


def encoding_quality(
    sample: NDArray[np.float32], lo: float, hi: float, grey_max: int = 255
) -> EncodingQuality:
    """Judge the encoding lo..hi of a band from a sample of its values, (N,) in contract units."""
    values = sample.astype(np.float64)
    step = (hi - lo) / grey_max
    grey = np.clip(np.rint((values - lo) / step), 0, grey_max)
    noise = np.square(grey * step + lo - values).mean()
    low, high = np.quantile(values, [0.01, 0.99])
    inside = np.clip([low, high], lo, hi)
    return EncodingQuality(
        levels98=float((inside[1] - inside[0]) / step),
        sqnr_db=float(10 * np.log10(values.var() / noise)) if noise > 0 else None,
        clipped=float(((values < lo - step / 2) | (values > hi + step / 2)).mean()),
    )
