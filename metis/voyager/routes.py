"""Other ways to the same artifacts: the SDK's command line, and its deploy script with our YAML.

Both quantize again, from the float ONNX and the calibration set or its images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metis.backend import BackendError
from metis.voyager.backend import FLOAT_ONNX, Voyager, settings_for
from metis.voyager.process import fresh_folder, work

if TYPE_CHECKING:
    from pathlib import Path

    from metis.backend import CompiledModel, QuantizedModel, SdkOptions


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


def compile_with_axcompile(
    options: SdkOptions, model: QuantizedModel, samples: Path, into: Path, *, aipu_cores: int
) -> CompiledModel:
    """Compile with `axcompile` what `model` was quantized from.

    Args:
        options: for the SDK.
        model: of `Voyager.quantize`; its folder has the float ONNX.
        samples: .npy, float32, (N, 1, C, H, W): the calibration set.
        into: folder to write.
        aipu_cores: also the batch of one call.

    Raises:
        BackendError: the SDK refused, or ran with random data.
    """
    import numpy as np

    stored = np.load(samples, mmap_mode="r")
    with fresh_folder(into.parent) as folder:
        images, transform = folder / "images", folder / "transform.py"
        _write_numbers(images, len(stored))
        transform.write_text(_TRANSFORM.format(samples=str(samples.absolute())))
        said = work(
            "axcompile",
            {
                "extra": dict(options.extra),
                "settings": settings_for(model.scheme, aipu_cores),
                "student": str((model.path / FLOAT_ONNX).absolute()),
                "images": str(images.absolute()),
                "transform": f"{transform.absolute()}:get_preprocess_transform",
                "input_shape": ",".join(map(str, stored.shape[1:])),
            },
            folder,
            time_limit_s=options.time_limit_s,
            python=options.python,
        )
        return Voyager(options).adopt(model, folder / "work", into, aipu_cores, said)


def _write_numbers(folder: Path, count: int) -> None:
    """Images whose pixels all hold the image's number: red + 256 green + 65536 blue."""
    import numpy as np

    from preprocessing.images import write_in_order

    numbers = np.arange(count)[:, None] >> np.array([0, 8, 16]) & 255
    write_in_order(
        (np.full((_SIDE, _SIDE, 3), number, np.uint8) for number in numbers), folder, count
    )


def compile_with_deploy(
    options: SdkOptions, model: QuantizedModel, pipeline: Path, into: Path, *, aipu_cores: int
) -> CompiledModel:
    """Compile with deploy.py the student that a pipeline YAML describes.

    Args:
        options: for the SDK.
        model: the same student, quantized.
        pipeline: folder with the YAML, the student and its images.
        into: folder to write.
        aipu_cores: also the batch of one call.

    Raises:
        BackendError: there is no YAML, or the SDK refused.
    """
    found = sorted(pipeline.glob("*.yaml"))
    if not found:
        raise BackendError("compile.route: deploy needs a pipeline YAML, and this student has none")
    if options.extra:
        raise BackendError("compile.extra does not reach deploy.py; use compile.route: api")
    with fresh_folder(into.parent) as folder:
        said = work(
            "deploy",
            {
                "yaml": str(found[0].absolute()),
                "data_root": str(pipeline.absolute()),
                "samples": len(list(pipeline.glob("*/calibration/*.png"))),
                "cores": aipu_cores,
            },
            folder,
            time_limit_s=options.time_limit_s,
            python=options.python,
        )
        return Voyager(options).adopt(model, folder / "work", into, aipu_cores, said)
