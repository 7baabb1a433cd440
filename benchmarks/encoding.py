"""What an 8-bit encoding costs in top-1, on synthetic patches in the form of So2Sat LCZ42.

    python benchmarks/encoding.py

A small CNN sees red, green and blue of one patch, reflectance 0..2.8 scaled to 0..255 and z-scored.
Each encoding is judged twice, paired by seed: by a network trained on float that now gets 8-bit
images, and by one that was trained on images of the same encoding. The data are synthetic: read
the differences, not the top-1. Takes about five minutes on one core.
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
from torch import nn
from torch.nn import functional

from metis.device_constants import exact_range
from pipeline.synthetic import SIZE, write_so2sat
from preprocessing.apply import encode, normalized, scale, student_tensor, teacher_tensor
from preprocessing.contract import Scaling, StudentInput, ZScore, linear_encoding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TRAIN, TEST = 3400, 2000
RGB = [2, 1, 0]
SCALING = Scaling("linear", (0.0, 2.8), (0.0, 255.0))
PERCENTILES = (0.1, 99.9)
CHANNELS = ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1))  # width and stride of each convolution
EPOCHS = 12
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


def main() -> None:
    """Generate, train, print the table."""
    torch.set_num_threads(1)  # faster than two for networks this small, and reproducible
    start = time.perf_counter()
    train, test = make_splits(TRAIN, TEST)
    print(
        f"{TRAIN} training and {TEST} test patches, {len(SEEDS)} seeds; points of top-1 against "
        "float, mean ± sd over seeds\n\n"
        "| input | SQNR, worst band | trained on float, tested on it | trained and tested on it |\n"
        "|---|---|---|---|"
    )
    on_float = {seed: top1s(fit(train, FLOAT, seed), test) for seed in SEEDS}
    base = [on_float[seed][FLOAT] for seed in SEEDS]
    print(f"| {FLOAT} | - | top-1 {spread(base)} % | the same |", flush=True)
    for name in train.tensors:
        if name == FLOAT:
            continue
        deployed = [on_float[seed][name] for seed in SEEDS]
        trained = [top1s(fit(train, name, seed), test)[name] for seed in SEEDS]
        print(
            f"| {name} | {sqnr_db(test, name):.1f} dB | {spread(differences(deployed, base), '+')} "
            f"| {spread(differences(trained, base), '+')} |",
            flush=True,
        )
    print(f"\n{time.perf_counter() - start:.0f} s")


def make_splits(train: int, test: int) -> tuple[Split, Split]:
    """Synthetic training and test cities in every encoding; constants come from the former."""
    (patches, labels), (test_patches, test_labels) = (
        read_synthetic(count, seed) for count, seed in ((train, 1), (test, 2))
    )
    values = scale(patches, SCALING).reshape(-1, len(RGB)).astype(np.float64)
    zscore = ZScore(tuple(values.mean(axis=0)), tuple(values.std(axis=0)))
    contract = student_input([SCALING.dst_range] * len(RGB), zscore)
    # Grey levels of the public script are reflectance times 255; here in contract units.
    stretched = student_input([(0.0, SCALING.gain)] * len(RGB), zscore)
    ends = np.percentile(values, PERCENTILES, axis=0).T
    fitted = student_input(
        [exact_range(*some) for some in zip(zscore.mu, zscore.sigma, *ends.T, strict=True)], zscore
    )

    def encoded(reflectance: NDArray[np.float64]) -> dict[str, NDArray[np.float32]]:
        def rounded(given: StudentInput) -> NDArray[np.float32]:
            return student_tensor(encode(reflectance, SCALING, given), given)

        truncated = np.clip(scale(reflectance, SCALING), 0, 255).astype(np.uint8)
        script = (np.clip(reflectance, 0, 1) * 255).astype(np.uint8)
        return {
            FLOAT: teacher_tensor(reflectance, SCALING, zscore, (SIZE, SIZE)),
            ROUNDED: rounded(contract),
            TRUNCATED: normalized(truncated, contract),
            STRETCHED: normalized(script, stretched),
            PERCENTILE: rounded(fitted),
        }

    return Split(encoded(patches), labels), Split(encoded(test_patches), test_labels)


def read_synthetic(patches: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Reflectance of red, green and blue, (N, 32, 32, 3), and classes, (N,)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patches.h5"
        write_so2sat(path, patches, seed)
        with h5py.File(path) as file:
            return file["sen2"][()][..., RGB], file["label"][()].argmax(axis=1)


def student_input(ranges: Sequence[tuple[float, float]], zscore: ZScore) -> StudentInput:
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
        **linear_encoding(ranges, zscore),
    )


def sqnr_db(split: Split, name: str) -> float:
    """Variance over the mean square of the encoding's error, of the band where it is lowest."""
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
def top1s(network: nn.Module, test: Split) -> dict[str, float]:
    """Top-1 by encoding of the test patches, in percent."""
    labels = torch.from_numpy(test.labels)
    result = {}
    for name, tensor in test.tensors.items():
        logits = torch.cat([network(part) for part in torch.from_numpy(tensor).split(500)])
        result[name] = 100 * (logits.argmax(dim=1) == labels).float().mean().item()
    return result


def differences(some: Sequence[float], base: Sequence[float]) -> list[float]:
    """Some minus base, seed by seed."""
    return [a - b for a, b in zip(some, base, strict=True)]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation as text."""
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
