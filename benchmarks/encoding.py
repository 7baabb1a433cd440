"""What an 8-bit encoding costs in top-1, on synthetic patches in the form of So2Sat LCZ42.

    python benchmarks/encoding.py

A small CNN sees red, green and blue of one patch, reflectance 0..2.8 scaled to 0..255 and z-scored.
It is trained on float and then gets 8-bit images, or is trained on images of the same encoding; all
figures are paired with float by seed. Other cities are as much darker or brighter as truncation
makes a patch, so there its shift may even help: what an encoding costs by itself is read off unseen
patches of the training cities.

The noise of the synthetic patches, 2.3 grey levels, dithers what rounding takes away. The second
table has it averaged over 5x5 pixels. Takes about five minutes on one core.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import nn
from torch.nn import functional

from metis.voyager.device_constants import exact_range
from pipeline.data.synthetic import SIZE, write_so2sat
from preprocessing.apply import encode, normalize, scale, student_tensor, teacher_tensor
from preprocessing.contract import Channels, Scaling, ZScore
from preprocessing.student_input import StudentInput, linear_encoding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TRAIN, TEST = 3400, 4000
#: Each is a set of 16 cities; the first is trained on.
CITY_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
RGB = [2, 1, 0]
SCALING = Scaling("linear", (0.0, 2.8), (0.0, 255.0))
PERCENTILES = (0.1, 99.9)
CHANNELS = ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1))  # width and stride of each convolution
EPOCHS = 10
BATCH = 64
LEARNING_RATE = 4e-3
SEEDS = (0, 1, 2)

FLOAT = "float"
ROUNDED = "contract, rounded"
TRUNCATED = "contract, truncated"
STRETCHED = "clipped at reflectance 1.0, times 255, truncated"
PERCENTILE = "percentile, rounded"


@dataclass(frozen=True)
class Split:
    """Labels, and by encoding what the network sees."""

    tensors: dict[str, NDArray[np.float32]]  # (N, 3, 32, 32), in standard deviations
    labels: NDArray[np.int64]  # (N,)


@dataclass(frozen=True)
class Splits:
    """Training patches, unseen patches of the same cities, and patches of other cities."""

    train: Split
    same: Split
    other: Split


def main() -> None:
    """Generate, train, print both tables."""
    torch.set_num_threads(1)  # faster than two for networks this small, and reproducible
    start = time.perf_counter()
    print(
        f"{TRAIN} training patches, {TEST} test patches of the same cities and {TEST} of others; "
        f"points of top-1 against float, mean ± sd over {len(SEEDS)} seeds"
    )
    for smoothed in (1, 5):
        splits = make_splits(TRAIN, TEST, smoothed)
        words = "as generated" if smoothed == 1 else f"averaged over {smoothed}x{smoothed} pixels"
        print(
            f"\n| {words} | SQNR, worst band | decisions changed | trained on float: same cities "
            "| other cities | trained on it: same cities |\n|---|---|---|---|---|---|"
        )
        print_rows(splits, also_trained=smoothed == 1)
    print(f"\n{time.perf_counter() - start:.0f} s")


def print_rows(splits: Splits, *, also_trained: bool) -> None:
    """Train on float and, if asked to, on every encoding; print a row for each."""
    networks = [fit(splits.train, FLOAT, seed) for seed in SEEDS]
    tests = (splits.same, splits.other)
    exact = [[decisions(network, test.tensors[FLOAT]) for network in networks] for test in tests]
    base = [[top1(some, test) for some in found] for found, test in zip(exact, tests, strict=True)]
    print(f"| float | - | - | {' | '.join(f'top-1 {spread(some)} %' for some in base)} | - |")
    for name in splits.train.tensors:
        if name == FLOAT:
            continue
        given = [[decisions(network, test.tensors[name]) for network in networks] for test in tests]
        changed = [100 * float((a != b).mean()) for a, b in zip(given[0], exact[0], strict=True)]
        costs = [spread(gains(*some), "+") for some in zip(base, given, tests, strict=True)]
        trained = "-"
        if also_trained:
            again = [fit(splits.train, name, seed) for seed in SEEDS]
            decided = [decisions(network, splits.same.tensors[name]) for network in again]
            trained = spread(gains(base[0], decided, splits.same), "+")
        print(
            f"| {name} | {sqnr_db(splits.same, name):.1f} dB | {spread(changed)} % | "
            f"{' | '.join(costs)} | {trained} |",
            flush=True,
        )


def make_splits(train: int, test: int, smoothed: int = 1) -> Splits:
    """Synthetic patches in every encoding, whose constants come from the training patches.

    Args:
        train: number of training patches.
        test: number of test patches of the training cities, and again of other cities.
        smoothed: edge in pixels of the box that each patch is averaged over.
    """
    first, *others = CITY_SEEDS
    patches, labels = read_synthetic(train + test, first, smoothed)
    elsewhere = [read_synthetic(test // len(others), seed, smoothed) for seed in others]
    values = scale(patches[:train], SCALING).reshape(-1, len(RGB)).astype(np.float64)
    zscore = ZScore(tuple(values.mean(axis=0)), tuple(values.std(axis=0)))
    channels = Channels("optical", tuple(range(len(RGB))), SCALING, zscore)
    contract = student_input([SCALING.dst_range] * len(RGB), channels)
    # Grey levels of the public script are reflectance times 255; here in contract units.
    stretched = student_input([(0.0, SCALING.gain)] * len(RGB), channels)
    ends = np.percentile(values, PERCENTILES, axis=0)
    fitted = student_input(
        [exact_range(*some) for some in zip(zscore.mu, zscore.sigma, *ends, strict=True)],
        channels,
    )

    def split(reflectance: NDArray[np.float64], labels: NDArray[np.int64]) -> Split:
        def rounded(given: StudentInput) -> NDArray[np.float32]:
            return student_tensor(encode(reflectance, channels, given), given)

        truncated = np.clip(scale(reflectance, SCALING), 0, 255).astype(np.uint8)
        script = (np.clip(reflectance, 0, 1) * 255).astype(np.uint8)
        tensors = {
            FLOAT: teacher_tensor(reflectance, channels, (SIZE, SIZE)),
            ROUNDED: rounded(contract),
            TRUNCATED: normalize(truncated, contract),
            STRETCHED: normalize(script, stretched),
            PERCENTILE: rounded(fitted),
        }
        return Split(tensors, labels)

    return Splits(
        train=split(patches[:train], labels[:train]),
        same=split(patches[train:], labels[train:]),
        other=split(*(np.concatenate(some) for some in zip(*elsewhere, strict=True))),
    )


def read_synthetic(
    patches: int, seed: int, smoothed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Reflectance of red, green and blue, (N, 32, 32, 3), and classes, (N,)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patches.h5"
        write_so2sat(path, patches, seed)
        with h5py.File(path) as file:
            reflectance = uniform_filter(file["sen2"][()][..., RGB], (1, smoothed, smoothed, 1))
            return reflectance, file["label"][()].argmax(axis=1)


def student_input(ranges: Sequence[tuple[float, float]], channels: Channels) -> StudentInput:
    """The input of a network of the patches' size, with grey levels over these ranges."""
    return StudentInput(
        modality="optical",
        bands=tuple(RGB),
        patch_hw=(SIZE, SIZE),
        size_hw=(SIZE, SIZE),
        interpolation="nearest",
        half_pixel_centers=False,
        device_resize=False,
        encoding="",
        contract="",
        **linear_encoding(ranges, channels),
    )


def sqnr_db(split: Split, name: str) -> float:
    """Variance over the mean square of the encoding's error, in the band where that is lowest."""
    exact = split.tensors[FLOAT].astype(np.float64)
    noise = np.square(split.tensors[name] - exact).mean(axis=(0, 2, 3))
    return float((10 * np.log10(exact.var(axis=(0, 2, 3)) / noise)).min())


def fit(train: Split, name: str, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """Train a network; one seed gives every encoding the same start and the same batches."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    width = len(RGB)
    for channels, stride in CHANNELS:
        convolution = nn.Conv2d(width, channels, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        width = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 17)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images, labels = torch.from_numpy(train.tensors[name]), torch.from_numpy(train.labels)
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * steps
    )
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            batch = images[rows]
            flips = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
            batch = batch.flip(flips).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(network(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def decisions(network: nn.Module, tensor: NDArray[np.float32]) -> NDArray[np.int64]:
    """The class that the network chooses, (N,)."""
    parts = torch.from_numpy(tensor).split(500)
    return torch.cat([network(part).argmax(dim=1) for part in parts]).numpy()


def top1(decided: NDArray[np.int64], test: Split) -> float:
    """In percent."""
    return 100 * float((decided == test.labels).mean())


def gains(base: Sequence[float], decided: Sequence[NDArray[np.int64]], test: Split) -> list[float]:
    """Points of top-1 that these decisions are above those of float, seed by seed."""
    return [top1(some, test) - exact for some, exact in zip(decided, base, strict=True)]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation as text."""
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
