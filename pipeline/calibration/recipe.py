"""Float student to int8 on the emulator: what each choice costs, which layers, what to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx

from metis.backend import SCHEMES
from metis.emulator.backend import Emulator
from metis.quantize.baking import baked
from metis.quantize.equalization import equalize
from metis.quantize.folding import SplitGraph, prepare
from metis.quantize.placement import compute_nodes, watch
from metis.quantize.ranges import RangeError, Ranges, choose
from pipeline.params.calibrate import CalibrateParams
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from metis.backend import QuantizedModel
    from metis.quantize.observers import Observer


@dataclass(frozen=True)
class Recipe:
    """How a float student becomes int8."""

    scheme: str
    observer: str | None = None  # None: the scheme's
    overrides: Mapping[str, str | tuple[float, float]] | None = None
    given: Ranges | None = None  # used instead of what is observed
    bias_correction: bool = True
    equalization: bool = False
    weight_clipping: bool = False

    def under(self, scheme: str) -> Recipe:
        """The same under this scheme; observer and given ranges were chosen for one scheme."""
        if scheme == self.scheme:
            return self
        return replace(self, scheme=scheme, observer=None, given=None)


@dataclass(frozen=True)
class Calibrated:
    """A float student whose tensors have been watched."""

    parts: SplitGraph
    seen: Observer
    pairs: int  # of layers that equalization moved scale between

    def ranges(self, recipe: Recipe) -> Ranges:
        """The ranges of a recipe.

        Raises:
            InputError: an override, or a given range, does not fit.
        """
        try:
            if recipe.given is not None:
                recipe.given.check(self.seen)
                return recipe.given
        except RangeError as error:
            raise InputError(f"calibrate.ranges_file: {error}") from error
        observer = recipe.observer or SCHEMES[recipe.scheme]
        try:
            return choose(self.seen, observer, recipe.overrides)
        except RangeError as error:
            raise InputError(f"calibrate.ranges: {error}") from error

    def baked(self, recipe: Recipe, ranges: Ranges) -> onnx.ModelProto:
        """The float student that is handed to whoever quantizes."""
        return baked(
            self.parts,
            self.seen,
            ranges,
            correct_bias=recipe.bias_correction,
            clip_weights=recipe.weight_clipping,
        )

    @property
    def layers(self) -> int:
        """How many operators have weights."""
        return sum(1 for _ in compute_nodes(self.parts.core))


def watched(
    student: Path, samples: Path, recipe: Recipe, progress: Callable[[int], object]
) -> Calibrated:
    """One pass over the samples, (N, 1, C, H, W); memory does not grow with N."""
    parts, pairs = prepare_student(student, recipe)
    seen = watch(parts)
    seen.add(np.load(samples, mmap_mode="r")[:, 0], progress)
    return Calibrated(parts, seen, pairs)


def prepare_student(student: Path, recipe: Recipe) -> tuple[SplitGraph, int]:
    """The folded student, equalized if the recipe says so, and how many pairs of layers were."""
    parts = prepare(onnx.load(student))
    if not recipe.equalization:
        return parts, 0
    moved, pairs = equalize(parts.student)
    return prepare(moved), pairs


@contextmanager
def emulated(student: Path, ranges: Path, scheme: str) -> Iterator[QuantizedModel]:
    """The emulator's int8 model of a float student, in a folder that does not stay."""
    with TemporaryDirectory(prefix="kdpipe-") as folder:
        into = Path(folder) / "int8"
        yield Emulator().write(
            prepare(onnx.load(student)), Ranges.load(ranges), into, scheme=scheme
        )


def recipe_of(params: CalibrateParams, ranges: Path | None = None) -> Recipe:
    """The parameters that decide how a float student becomes int8.

    Args:
        params: the section `calibrate`.
        ranges: the file that it names.

    Raises:
        InputError: the file is none of ranges.
    """
    from metis.quantize.ranges import RangeError, Ranges

    try:
        given = Ranges.load(ranges) if ranges is not None else None
    except RangeError as error:
        raise InputError(f"calibrate.ranges_file: {error}") from error
    return Recipe(
        scheme=params.scheme,
        observer=params.observer,
        overrides=params.ranges,
        given=given,
        bias_correction=params.bias_correction,
        equalization=params.equalization,
        weight_clipping=params.weight_clipping,
    )
