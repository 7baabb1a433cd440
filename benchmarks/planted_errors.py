"""Twenty planted preprocessing errors: how many does parity find, and how many one image?

    kdpipe run -c examples/landsat/kdpipe.yaml --to compile
    python benchmarks/planted_errors.py [examples/landsat/runs/landsat]

Each error is planted in a copy of what travels to the SDK: the pipeline YAML or exported images.
The peer is what forums advise: put one image through both sides and compare the logits, once by the
class that wins, once within 1 % of the logits' range. It gets the first validation image, and the
float student on both sides, so that nothing but preprocessing can differ.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metis.voyager.pipeline_reader import Pipeline, PipelineError
from pipeline.data.dataset import StudentData
from pipeline.networks.inference import reference_logits
from pipeline.params.benchmark import Limits
from pipeline.parity.images import image_legs
from pipeline.parity.legs import judge
from pipeline.run.manifest import load_manifest
from preprocessing.images import class_folders, read_png, write_png

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.artifacts import Artifacts

LIMITS = Limits(1.0, 1e-5, 1e-3, 1.0)

#: Of the range of the logits of the image.
CLOSE = 0.01


@dataclass(frozen=True)
class Place:
    """A copy of what travels."""

    yaml: Path
    images: list[Path]  # of the validation split, the one that the peer looks at first

    def edit(self, old: str, new: str) -> None:
        text = self.yaml.read_text()
        changed = re.sub(old, new, text, count=1)
        assert changed != text, old
        self.yaml.write_text(changed)

    def edit_numbers(self, key: str, change: Callable[[float], float]) -> None:
        found = re.search(rf"{key}: (.*)", self.yaml.read_text())
        assert found
        values = [change(float(word)) for word in found[1].split(",")]
        self.edit(rf"{key}: .*", f"{key}: {', '.join(f'{v:.6g}' for v in values)}")

    def edit_images(self, change: Callable[[np.ndarray], np.ndarray], which: slice) -> None:
        for path in self.images[which]:
            write_png(np.ascontiguousarray(change(read_png(path))), path)


EVERY, LATER = slice(None), slice(1, None)


def swap(place: Place, a: int, b: int) -> None:
    one, other = place.images[a], place.images[b]
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


ERRORS: dict[str, Callable[[Place], None]] = {
    "mean and std in the order of BGR": lambda p: (
        p.edit(r"mean: (\S+), (\S+), (\S+)", r"mean: \3, \2, \1"),
        p.edit(r"std: (\S+), (\S+), (\S+)", r"std: \3, \2, \1"),
    )[0],
    "std of two bands exchanged": lambda p: p.edit(r"std: (\S+), (\S+), (\S+)", r"std: \2, \1, \3"),
    "images read as BGR": lambda p: p.edit("color_format: RGB", "color_format: BGR"),
    "no z-score": lambda p: p.edit(r"        - normalize:\n.*\n.*\n", ""),
    "z-score twice": lambda p: p.edit(r"(        - normalize:\n.*\n.*\n)", r"\1\1"),
    "divided by 255 first": lambda p: p.edit("scale: False", "scale: True"),
    "mean in units of 0..1": lambda p: p.edit_numbers("mean", lambda v: v / 255),
    "mean and std of ImageNet": lambda p: (
        p.edit(r"mean: .*", "mean: 123.675, 116.28, 103.53"),
        p.edit(r"std: .*", "std: 58.395, 57.12, 57.375"),
    )[0],
    "mean rounded to whole numbers": lambda p: p.edit_numbers("mean", lambda v: float(round(v))),
    "mean with one decimal": lambda p: p.edit_numbers("mean", lambda v: round(v, 1)),
    "std squared (the variance)": lambda p: p.edit_numbers("std", lambda v: v * v),
    "std of another year, 3 % off": lambda p: p.edit_numbers("std", lambda v: v * 1.03),
    "every image truncated, one level darker": lambda p: p.edit_images(
        lambda i: np.where(i > 0, i - 1, 0).astype(np.uint8), EVERY
    ),
    "every image mirrored": lambda p: p.edit_images(lambda i: i[:, ::-1], EVERY),
    "every image turned": lambda p: p.edit_images(lambda i: i.transpose(1, 0, 2), EVERY),
    "contrast stretched on export": lambda p: p.edit_images(
        lambda i: ((i - float(i.min())) * (255 / max(1.0, float(i.max()) - i.min()))).astype(
            np.uint8
        ),
        EVERY,
    ),
    "channels of later images exchanged": lambda p: p.edit_images(lambda i: i[..., ::-1], LATER),
    "one image saved darker": lambda p: p.edit_images(
        lambda i: (i * 0.8).astype(np.uint8), slice(40, 41)
    ),
    "two images exchanged": lambda p: swap(p, 17, 400),
    "one pixel of one image": lambda p: p.edit_images(_one_pixel, slice(100, 101)),
}


def _one_pixel(image: np.ndarray) -> np.ndarray:
    changed = image.copy()
    changed[0, 0, 0] ^= 1
    return changed


def main() -> None:
    """Plant every error, look with both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("examples/landsat/runs/landsat"))
    run: Path = parser.parse_args().run
    manifest = load_manifest(run)
    if manifest is None or "device_pipeline" not in manifest.artifacts:
        sys.exit(f"{run} is not compiled; kdpipe run --to compile does that")
    artifacts = manifest.paths(run)
    found = {"parity": 0, "class": 0, "logits": 0}
    honest = look(artifacts, manifest.run, None)
    assert honest == (False, False, False), f"the run itself differs: {honest}"
    print(f"{'planted error':<42} parity  one image: class  one image: logits within 1 %")
    for name, plant in ERRORS.items():
        seen = look(artifacts, manifest.run, plant)
        for key, hit in zip(found, seen, strict=True):
            found[key] += hit
        words = ["found" if hit else "-" for hit in seen]
        print(f"{name:<42} {words[0]:<7} {words[1]:<17} {words[2]}")
    total = len(ERRORS)
    parity, winner, logits = found.values()
    print(f"{f'found, of {total}':<42} {parity:<7} {winner:<17} {logits}")


def look(
    artifacts: Artifacts, run: str, plant: Callable[[Place], None] | None
) -> tuple[bool, bool, bool]:
    """Whether parity, the winning class of one image, and its logits notice an error."""
    data = StudentData(artifacts)
    labels, val = class_folders(data.labels), data.val
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "device_pipeline"
        shutil.copytree(artifacts.device_pipeline, copy)
        root = copy / f"{run}-images" / "val"
        images = [
            root / labels[label] / f"row{row}.png"
            for label, row in zip(val.labels, val.rows, strict=True)
        ]
        place = Place(copy / f"{run}.yaml", images)
        if plant is not None:
            plant(place)
        legs = image_legs(data, copy, run)
        by_parity = any(judge(leg, LIMITS).passed is False for leg in legs)
        trained = reference_logits(artifacts.student, data.tensors(val, slice(1)))
        try:
            tensor = Pipeline(place.yaml.read_text()).tensor(read_png(images[0])[None])
        except PipelineError:
            return by_parity, True, True
        deployed = reference_logits(artifacts.student, tensor)
    other_class = bool(trained.argmax() != deployed.argmax())
    far = float(np.abs(trained - deployed).max()) > CLOSE * float(np.ptp(trained))
    return by_parity, other_class, far


if __name__ == "__main__":
    main()
