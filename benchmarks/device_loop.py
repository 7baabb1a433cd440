"""What a frame costs around the runtime's call on a device, against plain numpy expressions.

    python benchmarks/device_loop.py

One float32 frame becomes the device's int8 tensor (quantize, NHWC, pad), and the device's output
the logits (cut, NCHW, dequantize), on one thread: with the buffers of preprocessing/int8.py, as
kdbench does it, and as the SDK's documentation writes it down, with np.round, np.clip, np.pad and
transpose. Both by turns. The bar is 10 % of an inference of 2 ms.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.int8 import InputBuffer, OutputBuffer, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

REPETITIONS = 400
INFERENCE_MS = 2.0
BAR = 0.10
#: Height and width, channels, channels on the device, padding in space.
CASES = ((224, 3, 4, 0), (224, 3, 4, 3), (224, 3, 64, 0), (64, 10, 16, 0), (32, 3, 4, 0))
CLASSES, DEVICE_CLASSES = 17, 64


def main() -> None:
    """Measure every case and print the table."""
    print(
        f"one thread; median of {REPETITIONS} frames by turns; share of a {INFERENCE_MS:g} ms "
        f"inference, bar {BAR:.0%} at 224x224x3\n\n"
        "| frame | on the device | buffers | share | plain numpy | ratio |\n"
        "|---|---|---|---|---|---|"
    )
    for size, channels, padded, space in CASES:
        source, target = specs(size, channels, padded, space)
        random = np.random.default_rng(0)
        frames = random.normal(0, 1, (8, 1, channels, size, size)).astype(np.float32)
        codes = random.integers(-128, 128, target.shape, np.int8)
        into, out = InputBuffer(source), OutputBuffer(target)
        out.codes[...] = codes

        def ours(
            frame: NDArray[np.float32], into: InputBuffer = into, out: OutputBuffer = out
        ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
            return into.fill(frame), out.read()

        def theirs(
            frame: NDArray[np.float32],
            codes: NDArray[np.int8] = codes,
            source: TensorSpec = source,
            target: TensorSpec = target,
        ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
            return plain_input(frame, source), plain_output(codes, target)

        for a, b in zip(ours(frames[0]), theirs(frames[0]), strict=True):
            np.testing.assert_array_equal(a, b)
        a, b = medians(frames, ours, theirs)
        print(
            f"| {size}x{size}x{channels} | {'x'.join(map(str, source.shape[1:]))} | "
            f"{a * 1e6:.0f} us | {a * 1e3 / INFERENCE_MS:.1%} | {b * 1e6:.0f} us | {b / a:.1f} |",
            flush=True,
        )


def specs(size: int, channels: int, padded: int, space: int) -> tuple[TensorSpec, TensorSpec]:
    """A device input and a device output."""
    sides = (space, space)
    source = TensorSpec(
        "input",
        (1, size + 2 * space, size + 2 * space, padded),
        ((0, 0), sides, sides, (0, padded - channels)),
        0.0187,
        3,
    )
    target = TensorSpec(
        "output",
        (1, 1, 1, DEVICE_CLASSES),
        ((0, 0), (0, 0), (0, 0), (0, DEVICE_CLASSES - CLASSES)),
        0.12,
        -7,
    )
    return source, target


def plain_input(frame: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.int8]:
    """The documented formula, then np.pad over the whole padding list."""
    codes = np.clip(
        np.round(frame / np.float32(spec.scale) + np.float32(spec.zero_point)), -128, 127
    ).astype(np.int8)
    return np.pad(codes.transpose(0, 2, 3, 1), spec.padding, constant_values=spec.zero_point)


def plain_output(codes: NDArray[np.int8], spec: TensorSpec) -> NDArray[np.float32]:
    """Cut, transpose, dequantize."""
    cut = codes[spec.inside].transpose(0, 3, 1, 2)
    return (cut.astype(np.float32) - spec.zero_point) * np.float32(spec.scale)


def medians(
    frames: NDArray[np.float32], *contenders: Callable[[NDArray[np.float32]], object]
) -> list[float]:
    """Seconds per frame of each; they take turns, so that a busy moment hits them alike."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for repetition in range(REPETITIONS):
        frame = frames[repetition % len(frames)]
        for contender, some in zip(contenders, seconds, strict=True):
            start = time.perf_counter()
            contender(frame)
            some.append(time.perf_counter() - start)
    return [statistics.median(some) for some in seconds]


if __name__ == "__main__":
    main()
