"""Synthetic files in the form of So2Sat LCZ42, for tests and for trying kdpipe without the 52 GB.

Not measured data: the classes are mixtures of eight invented materials. Statements made on them
hold for comparisons between methods only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py
import numpy as np

from pipeline.run.files import new_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


#: Attribute that marks a file as synthetic; every report made from it says so.
MARK = "synthetic"

CLASSES = 17

SIZE = 32

#: Sentinel-2 bands of `sen2`, in order.
OPTICAL_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")

SAR_BANDS = 8

#: Reflectance of water, conifers, grass, soil, asphalt, concrete, red roof, metal roof.
_SPECTRA = np.array(
    [
        [0.085, 0.075, 0.060, 0.055, 0.045, 0.045, 0.040, 0.040, 0.020, 0.015],
        [0.085, 0.078, 0.062, 0.085, 0.200, 0.245, 0.255, 0.275, 0.130, 0.065],
        [0.095, 0.098, 0.085, 0.130, 0.270, 0.325, 0.330, 0.355, 0.220, 0.120],
        [0.112, 0.118, 0.128, 0.165, 0.205, 0.225, 0.230, 0.250, 0.300, 0.240],
        [0.112, 0.108, 0.106, 0.110, 0.125, 0.130, 0.130, 0.135, 0.140, 0.130],
        [0.142, 0.142, 0.145, 0.165, 0.190, 0.200, 0.205, 0.210, 0.225, 0.210],
        [0.115, 0.112, 0.135, 0.170, 0.205, 0.215, 0.215, 0.230, 0.240, 0.200],
        [0.178, 0.175, 0.172, 0.185, 0.220, 0.225, 0.235, 0.235, 0.230, 0.215],
    ]
)

#: Backscatter amplitude of the same materials, and how much of it is cross-polarized.
_SCATTER = np.array([0.02, 0.10, 0.05, 0.06, 0.04, 0.18, 0.22, 0.30])

_CROSS = np.array([0.05, 0.50, 0.30, 0.15, 0.08, 0.20, 0.18, 0.10])

#: Share of each material in each class (rows: compact high-rise to water, as LCZ 1-10 and A-G).
_MIXTURES = np.array(
    [
        [0.00, 0.02, 0.02, 0.00, 0.34, 0.42, 0.08, 0.12],
        [0.00, 0.04, 0.04, 0.02, 0.30, 0.32, 0.24, 0.04],
        [0.00, 0.06, 0.08, 0.06, 0.24, 0.16, 0.38, 0.02],
        [0.00, 0.14, 0.16, 0.02, 0.24, 0.34, 0.02, 0.08],
        [0.00, 0.14, 0.22, 0.04, 0.22, 0.24, 0.12, 0.02],
        [0.00, 0.18, 0.30, 0.06, 0.16, 0.06, 0.24, 0.00],
        [0.00, 0.04, 0.10, 0.38, 0.10, 0.06, 0.16, 0.16],
        [0.00, 0.02, 0.06, 0.06, 0.30, 0.22, 0.04, 0.30],
        [0.00, 0.28, 0.42, 0.10, 0.06, 0.04, 0.10, 0.00],
        [0.04, 0.04, 0.06, 0.16, 0.26, 0.20, 0.04, 0.20],
        [0.00, 0.86, 0.10, 0.04, 0.00, 0.00, 0.00, 0.00],
        [0.00, 0.44, 0.44, 0.12, 0.00, 0.00, 0.00, 0.00],
        [0.00, 0.18, 0.44, 0.38, 0.00, 0.00, 0.00, 0.00],
        [0.00, 0.02, 0.76, 0.22, 0.00, 0.00, 0.00, 0.00],
        [0.02, 0.00, 0.04, 0.20, 0.50, 0.24, 0.00, 0.00],
        [0.02, 0.02, 0.12, 0.82, 0.02, 0.00, 0.00, 0.00],
        [0.92, 0.02, 0.02, 0.02, 0.02, 0.00, 0.00, 0.00],
    ]
)

#: Edge of the uniform cells of a class, in pixels: its texture.
_CELL = (2, 1, 1, 4, 2, 2, 1, 8, 4, 4, 2, 4, 2, 8, 4, 8, 16)

#: How much of haze, calibration error and noise each optical band gets: the visible ones most.
_VISIBLE = np.array([1, 1, 1, 0.6, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1])

#: Cities in one file.
_CITIES = 16

_BLOCK = 256


def write_so2sat(
    path: Path,
    patches: int,
    seed: int,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Write sen1 (N, 32, 32, 8), sen2 (N, 32, 32, 10), both float64, and label (N, 17), one-hot.

    The seed gives the cities (each shifts the gain of every band) and the patches; the classes stay
    the same, so two seeds are training and test cities of one task.

    Args:
        path: the HDF5 file to write.
        patches: how many; every class appears once 17 are asked for.
        seed: of everything random.
        progress: called with the number of patches just written.

    Raises:
        InputError: the file exists, or can't be written there.
    """
    random = np.random.default_rng(seed)
    cities = _Cities(random)
    labels = random.permutation(np.arange(patches) % CLASSES)
    with new_file(path) as partial, h5py.File(partial, "w") as file:
        file.attrs[MARK] = f"kdpipe synth so2sat --patches {patches} --seed {seed}"
        sen1 = file.create_dataset("sen1", (patches, SIZE, SIZE, SAR_BANDS), np.float64)
        sen2 = file.create_dataset("sen2", (patches, SIZE, SIZE, len(OPTICAL_BANDS)), np.float64)
        file.create_dataset("label", data=np.eye(CLASSES)[labels])
        for start in range(0, patches, _BLOCK):
            block = labels[start : start + _BLOCK]
            materials = _material_maps(block, random)
            stop = start + len(block)
            sen2[start:stop] = _optical(materials, cities, random)
            sen1[start:stop] = _sar(materials, random)
            progress(len(block))


class _Cities:
    """Some cities; each has its gain per band, and its haze, which the visible bands see most."""

    def __init__(self, random: np.random.Generator) -> None:
        self.gain = random.normal(1.0, 0.015 + 0.045 * _VISIBLE, (_CITIES, len(OPTICAL_BANDS)))
        self.haze = random.uniform(0, 0.020, (_CITIES, 1)) * _VISIBLE


def _material_maps(labels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Which material each pixel is, (N, 32, 32): cells of the class's size, mixed by its shares."""
    maps = np.empty((len(labels), SIZE, SIZE), np.int64)
    for i, label in enumerate(labels):
        # A patch is never the pure class: its shares vary, and another class reaches into it.
        shares = random.dirichlet(_MIXTURES[label] * 24 + 0.02)
        neighbor = random.dirichlet(_MIXTURES[random.integers(CLASSES)] * 12 + 0.02)
        blend = random.beta(1, 8)
        shares = (1 - blend) * shares + blend * neighbor
        cell = min(SIZE, max(1, round(_CELL[label] * random.choice([0.5, 1, 2]))))
        cells = -(-SIZE // cell)
        materials = random.choice(len(shares), size=(cells, cells), p=shares)
        grown = materials.repeat(cell, axis=0).repeat(cell, axis=1)
        shift = random.integers(cell, size=2)
        maps[i] = np.roll(grown, tuple(shift), axis=(0, 1))[:SIZE, :SIZE]
    return maps


def _optical(
    materials: NDArray[np.int64], cities: _Cities, random: np.random.Generator
) -> NDArray[np.float64]:
    """Reflectance, (N, 32, 32, 10): spectra, blurred by the sensor, shaded, with noise."""
    clean = _SPECTRA[materials]
    blurred = 0.6 * clean
    for axis in (1, 2):
        for step in (-1, 1):
            blurred += 0.1 * np.roll(clean, step, axis=axis)
    shade = random.normal(1, 0.10, (*materials.shape[:1], 1, 1, 1))
    city = random.integers(len(cities.gain), size=len(materials))
    noisy = blurred * shade * cities.gain[city, None, None] + cities.haze[city, None, None]
    noisy += random.normal(0, 0.010 + 0.015 * _VISIBLE, blurred.shape)
    reflectance: NDArray[np.float64] = np.clip(noisy, 0.0001, 2.8)
    return reflectance


def _sar(materials: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.float64]:
    """VH and VV, real and imaginary, smoothed intensities and covariance, (N, 32, 32, 8)."""
    amplitude = _SCATTER[materials] * random.gamma(16, 1 / 16, (*materials.shape[:1], 1, 1))
    cross = amplitude * np.sqrt(_CROSS[materials])

    def speckle(mean: NDArray[np.float64]) -> NDArray[np.complex128]:
        noise = random.normal(0, np.sqrt(0.5), (2, *mean.shape))
        result: NDArray[np.complex128] = mean * (noise[0] + 1j * noise[1])
        return result

    vh, vv = speckle(cross), speckle(amplitude)

    def smooth(intensity: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = intensity
        for axis in (1, 2):
            mean = (np.roll(mean, -1, axis) + mean + np.roll(mean, 1, axis)) / 3
        return mean

    covariance = vh * vv.conj()
    bands = (
        vh.real,
        vh.imag,
        vv.real,
        vv.imag,
        smooth(np.abs(vh) ** 2),
        smooth(np.abs(vv) ** 2),
        smooth(covariance.real),
        smooth(covariance.imag),
    )
    return np.stack(bands, axis=-1)
