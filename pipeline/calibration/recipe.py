"""How a float student becomes int8: the recipe, what was observed, and the network that results."""

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
from metis.emulator.execute import int8_network
from metis.quantize.baking import bake_weights
from metis.quantize.equalization import equalize
from metis.quantize.folding import SplitGraph, prepare
from metis.quantize.placement import compute_nodes, open_observations
from metis.quantize.qdq import quantize_graph
from metis.quantize.ranges import RangeError, Ranges, choose
from pipeline.params.calibrate import CalibrateParams
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from metis.backend import QuantizedModel
    from metis.quantize.observers import Observations
    from pipeline.networks.inference import Network


@dataclass(frozen=True)
class QuantizationRecipe:
    """How a float student becomes int8."""

    scheme: str
    observer: str | None = None  # None: the scheme's
    overrides: Mapping[str, str | tuple[float, float]] | None = None
    ranges: Ranges | None = None  # used instead of what is observed
    bias_correction: bool = True
    equalization: bool = False
    weight_clipping: bool = False

    @staticmethod
    def of(params: CalibrateParams, ranges_file: Path | None = None) -> QuantizationRecipe:
        """What the section `calibrate` says; `ranges_file` is the file that it names.

        Raises:
            InputError: the file is none of ranges.
        """
        try:
            ranges = Ranges.load(ranges_file) if ranges_file is not None else None
        except RangeError as error:
            raise InputError(f"calibrate.ranges_file: {error}") from error
        return QuantizationRecipe(
            scheme=params.scheme,
            observer=params.observer,
            overrides=params.ranges,
            ranges=ranges,
            bias_correction=params.bias_correction,
            equalization=params.equalization,
            weight_clipping=params.weight_clipping,
        )

    def under(self, scheme: str) -> QuantizationRecipe:
        """The same under this scheme; observer and ranges were chosen for one scheme."""
        if scheme == self.scheme:
            return self
        return replace(self, scheme=scheme, observer=None, ranges=None)


@dataclass(frozen=True)
class ObservedStudent:
    """A float student, folded, and what its tensors held for the calibration samples."""

    parts: SplitGraph
    observations: Observations
    pairs: int  # of layers that equalization moved scale between

    @staticmethod
    def fold(student: Path, recipe: QuantizationRecipe) -> ObservedStudent:
        """Nothing observed yet; equalized if the recipe says so."""
        parts, pairs = prepare(onnx.load(student)), 0
        if recipe.equalization:
            balanced, pairs = equalize(parts.student)
            parts = prepare(balanced)
        return ObservedStudent(parts, open_observations(parts), pairs)

    @staticmethod
    def observe(
        student: Path,
        samples: Path,
        recipe: QuantizationRecipe,
        progress: Callable[[int], object] = lambda n: None,
    ) -> ObservedStudent:
        """One pass over the samples, (N, 1, C, H, W); memory does not grow with N."""
        observed = ObservedStudent.fold(student, recipe)
        observed.observations.add(np.load(samples, mmap_mode="r")[:, 0], progress)
        return observed

    def ranges(self, recipe: QuantizationRecipe) -> Ranges:
        """The ranges of a recipe.

        Raises:
            InputError: an override, or a range of the recipe's own, does not fit.
        """
        try:
            if recipe.ranges is not None:
                recipe.ranges.check(self.observations)
                return recipe.ranges
        except RangeError as error:
            raise InputError(f"calibrate.ranges_file: {error}") from error
        observer = recipe.observer or SCHEMES[recipe.scheme]
        try:
            return choose(self.observations, observer, recipe.overrides)
        except RangeError as error:
            raise InputError(f"calibrate.ranges: {error}") from error

    def bake_weights(self, recipe: QuantizationRecipe, ranges: Ranges) -> onnx.ModelProto:
        """The float student that is handed to whoever quantizes."""
        return bake_weights(
            self.parts,
            self.observations,
            ranges,
            correct_bias=recipe.bias_correction,
            clip_weights=recipe.weight_clipping,
        )

    def int8_network(self, recipe: QuantizationRecipe) -> Network:
        """What the emulator computes after this recipe, without a file.

        Raises:
            InputError: see `ranges`.
        """
        ranges = self.ranges(recipe)
        parts = prepare(self.bake_weights(recipe, ranges))
        graph = quantize_graph(parts.core, ranges, scheme=recipe.scheme)
        return int8_network(parts, graph, recipe.scheme)

    @property
    def layers(self) -> int:
        """How many operators have weights."""
        return sum(1 for _ in compute_nodes(self.parts.core))


@contextmanager
def emulate_int8(student: Path, ranges: Path, scheme: str) -> Iterator[QuantizedModel]:
    """The emulator's int8 model of a float student, in a folder that does not stay."""
    with TemporaryDirectory(prefix="kdpipe-") as folder:
        parts = prepare(onnx.load(student))
        yield Emulator().write(parts, Ranges.load(ranges), Path(folder) / "int8", scheme=scheme)
