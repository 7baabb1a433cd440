"""How fast a batch becomes the student's tensor, against the per-image chain of public guides.

    python benchmarks/student_tensor.py

Both turn the same 256 RGB patches of 32x32 into one float32 tensor of 224x224, each on one thread,
by turns. The chain is torchvision's Resize, ToTensor and Normalize on Pillow images that are
already open, then torch.stack. It has one bilinear, Pillow's, which is that of half_pixel_centers
false; the one of half_pixel_centers true is OpenCV's.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from preprocessing.apply import student_tensor
from preprocessing.student_input import StudentInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

COUNT = 256
OLD, NEW = 32, 224
MEAN, STD = (9.206, 9.952, 11.271), (6.044, 4.351, 3.605)  # grey levels
REPETITIONS = 15
#: Interpolation, half_pixel_centers, and how many times faster we want to be at least.
CASES = (("nearest", False, 5), ("bilinear", False, None), ("bilinear", True, None))


def main() -> None:
    """Measure every case and print the table."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, OLD, OLD, 3), np.uint8)
    opened = [Image.fromarray(image) for image in images]
    print(
        f"{COUNT} patches, {OLD}x{OLD}x3 uint8 to {NEW}x{NEW} float32; one thread each; "
        f"median of {REPETITIONS} by turns\n\n"
        "| interpolation | half_pixel_centers | student_tensor | torchvision chain | ratio | bar "
        "| largest difference | temporary memory / output |\n|---|---|---|---|---|---|---|---|"
    )
    for interpolation, half_pixel_centers, bar in CASES:
        given = student_input(interpolation, half_pixel_centers)
        chain = public_chain(interpolation)

        def ours(given: StudentInput = given) -> NDArray[np.float32]:
            return student_tensor(images, given)

        def theirs(chain: Callable[[Image.Image], torch.Tensor] = chain) -> torch.Tensor:
            return torch.stack([chain(image) for image in opened])

        difference = np.abs(ours() - theirs().numpy()) * np.array(STD)[:, None, None]
        memory = temporary_bytes(ours) / (COUNT * 3 * NEW * NEW * 4)
        a, b = medians(ours, theirs)
        print(
            f"| {interpolation} | {half_pixel_centers} | {a * 1e3:.1f} ms | {b * 1e3:.1f} ms | "
            f"{b / a:.1f} | {f'>= {bar}' if bar else '-'} | {difference.max():.3f} grey levels | "
            f"{memory:.2f} |",
            flush=True,
        )


def student_input(interpolation: str, half_pixel_centers: bool) -> StudentInput:
    """An RGB input of 224x224 from patches of 32x32."""
    return StudentInput(
        modality="optical",
        bands=(2, 1, 0),
        patch_hw=(OLD, OLD),
        size_hw=(NEW, NEW),
        interpolation=interpolation,
        half_pixel_centers=half_pixel_centers,
        device_resize=True,
        encoding="contract",
        grey_lo=(0.0,) * 3,
        grey_hi=(255.0,) * 3,
        mean=MEAN,
        std=STD,
        contract="",
    )


def public_chain(interpolation: str) -> Callable[[Image.Image], torch.Tensor]:
    """What guides to image classification do with one image."""
    return transforms.Compose(
        [
            transforms.Resize(
                (NEW, NEW), interpolation=transforms.InterpolationMode(interpolation)
            ),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )


def medians(*contenders: Callable[[], object]) -> list[float]:
    """Seconds of each; they take turns, so that a busy moment of the machine hits them alike."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(REPETITIONS):
        for contender, some in zip(contenders, seconds, strict=True):
            start = time.perf_counter()
            contender()
            some.append(time.perf_counter() - start)
    return [statistics.median(some) for some in seconds]


def temporary_bytes(contender: Callable[[], NDArray[np.float32]]) -> int:
    """Peak of what is allocated during a call beyond its result."""
    tracemalloc.start()
    result = contender()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak - result.nbytes


if __name__ == "__main__":
    main()
