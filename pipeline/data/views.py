"""Views: the same augmented look at a patch for teacher and student, told by three numbers.

A view is a function of (seed, row, view number) alone, and moves whole pixels: it flips, rotates by
quarter turns, shifts and zooms by picking, for every pixel, the one it comes from. So it gives the
same picture whether it is taken of float patches for a teacher or of their 8-bit images for the
student, today or in a year. Logits that were cached for one view are exact for that view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import TypeVar

    from numpy.typing import NDArray

    from pipeline.params.sources import ViewParams

    Scalar = TypeVar("Scalar", bound=np.generic)


def take_view(
    patches: NDArray[Scalar], rows: NDArray[np.int64], view: int, params: ViewParams, seed: int
) -> NDArray[Scalar]:
    """One view of some patches; view 0 is the patches as they are.

    Args:
        patches: (N, H, W, C), any dtype.
        rows: (N,), their rows in the source: with the seed and the view they decide the look.
        view: 0 .. params.count - 1.
        params: what may happen.
        seed: of the run.

    Returns:
        (N, H, W, C), same dtype. Pixels from beyond the edge repeat the edge.
    """
    if view == 0:
        return patches
    height, width = patches.shape[1:3]
    y, x = _origins(height, width, rows, view, params, seed)
    looked: NDArray[Scalar] = patches[np.arange(len(patches))[:, None, None], y, x]
    return looked


def _origins(
    height: int, width: int, rows: NDArray[np.int64], view: int, params: ViewParams, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column that each pixel of each patch comes from, (N, H, W) each."""
    chance = [_uniform(seed, rows, view, number)[:, None, None] for number in range(5)]
    y = np.arange(height).reshape(1, -1, 1) - (height - 1) / 2
    x = np.arange(width).reshape(1, 1, -1) - (width - 1) / 2
    zoom = 1 + params.zoom * (2 * chance[0] - 1)
    y, x = y / zoom, x / zoom
    if params.rotate:
        quarters = np.floor(4 * chance[1]) if height == width else 2 * np.floor(2 * chance[1])
        cosine = np.choose(quarters.astype(int), [1.0, 0.0, -1.0, 0.0])
        sine = np.choose(quarters.astype(int), [0.0, 1.0, 0.0, -1.0])
        y, x = cosine * y - sine * x, sine * y + cosine * x
    if params.flip:
        x = x * np.where(chance[2] < 0.5, -1, 1)
    for_y, for_x = (
        np.floor((2 * params.shift + 1) * chance[number]) - params.shift for number in (3, 4)
    )
    y, x = np.broadcast_arrays(y + for_y + (height - 1) / 2, x + for_x + (width - 1) / 2)
    return (
        np.clip(np.rint(y), 0, height - 1).astype(np.intp),
        np.clip(np.rint(x), 0, width - 1).astype(np.intp),
    )


def _uniform(seed: int, rows: NDArray[np.int64], view: int, number: int) -> NDArray[np.float64]:
    """One number in [0, 1) per row, a hash of all arguments: no row depends on another.

    Source:
        Finalizer of SplitMix64 (Steele, Lea, Flood 2014), applied once per argument.
    """
    with np.errstate(over="ignore"):
        state = np.full(len(rows), 0x9E3779B97F4A7C15, np.uint64)
        for part in (seed, view, number, rows):
            state = state ^ np.asarray(part).astype(np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    fraction: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) / 2**53
    return fraction
