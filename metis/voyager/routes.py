"""Ways through the SDK to device code: its Python, its command line, its script deploy.py.

The last two quantize again, from the float ONNX and the calibration set or its images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metis.backend import BackendError
from metis.voyager.settings import FLOAT_ONNX, settings_for

if TYPE_CHECKING:
    from pathlib import Path

    from metis.backend import QuantizedModel


@dataclass(frozen=True)
class Order:
    """What a route compiles, and from what."""

    model: QuantizedModel  # of `Voyager.quantize`; its folder has the float ONNX
    aipu_cores: int  # also the batch of one call
    samples: Path | None  # .npy, float32, (N, 1, C, H, W): the calibration set
    pipeline: Path | None  # folder with the YAML, the student and its images
    extra: Mapping[str, Any]  # what the user adds to the SDK's configuration


#: One piece of work in the SDK's interpreter: its verb, its folder, what it needs -> what came.
Work = Callable[..., dict[str, Any]]


#: What `axcompile --transform` runs. Images can't hold a student's bands, so each image holds the
#: number of a sample in its pixels, and the sample itself is read from the calibration set.
_TRANSFORM = '''\
import os
from pathlib import Path

import numpy
import torch

SAMPLES = numpy.load({samples!r}, mmap_mode="r")


def get_preprocess_transform(image):
    """The calibration sample, float32 (C, H, W), whose number the image's pixels hold."""
    red, green, blue = (int(level) for level in numpy.asarray(image)[0, 0, :3])
    sample = numpy.array(SAMPLES[red + 256 * green + 65536 * blue], numpy.float32)
    with Path(os.environ["KDPIPE_DONE"]).open("ab") as done:
        done.write(b".")
    return torch.from_numpy(sample if os.environ["KDPIPE_BATCHED"] else sample[0])
'''

#: Pixels per side of an image that holds a number.
_SIDE = 8


def compile_with_api(work: Work, order: Order, folder: Path) -> dict[str, Any]:
    """Compile the SDK's quantized model.

    Args:
        work: see `Work`.
        order: what to compile.
        folder: to be made; the compiler's output lies in its subfolder `work`.

    Raises:
        BackendError: the SDK refused.
    """
    # The compiler clears its output folder; it must not find the only copy of anything.
    return work(
        "compile",
        folder,
        quantized=str((order.model.path / order.model.entry).absolute()),
        settings=settings_for(order.model.scheme, order.aipu_cores),
        output_dir="compiled",
    )


def compile_with_axcompile(work: Work, order: Order, folder: Path) -> dict[str, Any]:
    """Compile with `axcompile` what the model was quantized from. See `compile_with_api`.

    Raises:
        BackendError: the SDK refused, or ran with random data.
    """
    import numpy as np

    assert order.samples is not None
    samples = np.load(order.samples, mmap_mode="r")
    images, transform = folder / "images", folder / "transform.py"
    _write_numbers(images, len(samples))
    transform.write_text(_TRANSFORM.format(samples=str(order.samples.absolute())))
    return work(
        "axcompile",
        folder,
        settings=settings_for(order.model.scheme, order.aipu_cores),
        student=str((order.model.path / FLOAT_ONNX).absolute()),
        images=str(images.absolute()),
        transform=f"{transform.absolute()}:get_preprocess_transform",
        input_shape=",".join(map(str, samples.shape[1:])),
    )


def _write_numbers(folder: Path, count: int) -> None:
    """Images whose pixels all hold the image's number: red + 256 green + 65536 blue."""
    import numpy as np

    from preprocessing.images import write_in_order

    numbers = np.arange(count)[:, None] >> np.array([0, 8, 16]) & 255
    write_in_order(
        (np.full((_SIDE, _SIDE, 3), number, np.uint8) for number in numbers), folder, count
    )


def compile_with_deploy(work: Work, order: Order, folder: Path) -> dict[str, Any]:
    """Compile with deploy.py the student that a pipeline YAML describes. See `compile_with_api`.

    Raises:
        BackendError: there is no YAML, or the SDK refused.
    """
    assert order.pipeline is not None
    files = sorted(order.pipeline.glob("*.yaml"))
    if not files:
        raise BackendError("compile.route: deploy needs a pipeline YAML, and this student has none")
    if order.extra:
        raise BackendError("compile.extra does not reach deploy.py; use compile.route: api")
    return work(
        "deploy",
        folder,
        yaml=str(files[0].absolute()),
        data_root=str(order.pipeline.absolute()),
        samples=len(list(order.pipeline.glob("*/calibration/*.png"))),
        cores=order.aipu_cores,
    )


#: By the names that `compile.route` gives them.
ROUTES: dict[str, Callable[[Work, Order, Path], dict[str, Any]]] = {
    "api": compile_with_api,
    "axcompile": compile_with_axcompile,
    "deploy": compile_with_deploy,
}
