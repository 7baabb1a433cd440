"""How fast patches come out of a So2Sat file, against opening it for every sample.

    python benchmarks/reading.py

The peer is the loader of a public training repository: open the file, read one patch, close it.
Prints patches per CPU second and the ratio, the median of runs by turns with a warm page cache, for
a contiguous file and for one with a chunk per patch, 737 MB each; takes about two minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from pipeline.data.formats.so2sat_h5 import open_so2sat
from pipeline.data.source import PatchSource, copy_bands
from pipeline.data.synthetic import write_so2sat

if TYPE_CHECKING:
    from collections.abc import Callable

DIFFERENT = 3000
PATCHES = 3 * DIFFERENT
SAMPLES = 600  # of the slow ways
RUNS = 9
BANDS = list(range(10))


def main() -> None:
    """Measure and print the table."""
    print("| way | contiguous | chunk per patch | bar |")
    print("|---|---|---|---|")
    columns = []
    with tempfile.TemporaryDirectory() as folder:
        write_so2sat(Path(folder) / "some.h5", DIFFERENT, seed=1)
        for name, chunks in (("contiguous", None), ("chunked", (1, 32, 32, 10))):
            path = Path(folder) / f"{name}.h5"
            with h5py.File(Path(folder) / "some.h5") as source, h5py.File(path, "w") as target:
                for key, layout in (("sen2", chunks), ("label", None)):
                    repeated = np.concatenate([source[key][()]] * (PATCHES // DIFFERENT))
                    target.create_dataset(key, data=repeated, chunks=layout)
            columns.append(rates(path, Path(folder) / "cache"))
            path.unlink()
    bars = {
        "one handle, a read per sample": ">= 10",
        "memory-mapped cache, random order": ">= 30",
        "sorted list of 128 rows on one handle": "never used",
    }
    peer = "open the file per sample"
    for way in columns[0]:
        cells = [f"{found[way]:,.0f}/s ({found[way] / found[peer]:.1f}x)" for found in columns]
        print(f"| {way} | {' | '.join(cells)} | {bars.get(way, '')} |")


def rates(path: Path, cache: Path) -> dict[str, float]:
    """Patches per second of every way, the median of interleaved runs."""
    source = open_so2sat(path, {"optical": "sen2"}, "label")
    copy = copy_bands(source, {"optical": BANDS}, path.name, cache, 512)
    order = np.random.default_rng(0).permutation(PATCHES)
    ways: dict[str, Callable[[], int]] = {
        "open the file per sample": lambda: open_per_sample(path, order[:SAMPLES]),
        "one handle, a read per sample": lambda: one_handle(path, order),
        "sorted list of 128 rows on one handle": lambda: sorted_lists(path, order[:SAMPLES]),
        "memory-mapped cache, random order": lambda: mapped(copy, order),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for _ in range(RUNS):
        for name, way in ways.items():
            start = time.process_time()
            counts[name] = way()
            seconds[name].append(time.process_time() - start)
    return {name: counts[name] / statistics.median(seconds[name]) for name in ways}


def open_per_sample(path: Path, order: np.ndarray) -> int:
    """The peer."""
    for row in order:
        with h5py.File(path) as file:
            file["sen2"][row].astype(np.float32)
    return len(order)


def one_handle(path: Path, order: np.ndarray) -> int:
    """Open once, read one patch at a time."""
    with h5py.File(path) as file:
        patches = file["sen2"]
        for row in order:
            patches[row].astype(np.float32)
    return len(order)


def sorted_lists(path: Path, order: np.ndarray) -> int:
    """The trap: h5py's list of indices."""
    with h5py.File(path) as file:
        for start in range(0, len(order), 128):
            file["sen2"][np.sort(order[start : start + 128])].astype(np.float32)
    return len(order)


def mapped(copy: PatchSource, order: np.ndarray) -> int:
    """What kdpipe does with data.cache: batches of free choice from a memory map."""
    total = 0
    for start in range(0, len(order), 128):
        total += len(copy.read("optical", np.sort(order[start : start + 128]), BANDS))
    return total


if __name__ == "__main__":
    main()
