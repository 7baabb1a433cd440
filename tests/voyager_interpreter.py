"""A second reader of pipeline YAML, for tests: Pillow, OpenCV and torch, and nothing of ours.

It does what the SDK's public Python layer does in calibration (release 1.2.5 to 1.8), and knows no
more operators than the tests need.
"""

import cv2
import numpy as np
import torch
import yaml
from PIL import Image

_PILLOW = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
_OPENCV = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR}


def interpret(text: str, files: list) -> np.ndarray:
    """The network's input, float32 (N, C, H, W), for image files."""
    (task,) = yaml.safe_load(text)["pipeline"]
    ((_, body),) = task.items()
    tensors = []
    for file in files:
        with Image.open(file) as opened:
            value = opened.convert("RGB")
        for step in body["preprocess"]:
            ((name, params),) = step.items()
            value = _apply(name, params or {}, value)
        tensors.append(value)
    return torch.stack(tensors).numpy()


def _apply(name, params, value):
    if name == "resize":
        size = (params["width"], params["height"])
        how = params.get("interpolation", "bilinear")
        if params.get("half_pixel_centers", False):
            return cv2.resize(np.asarray(value), size, interpolation=_OPENCV[how])
        gray = isinstance(value, np.ndarray) and value.ndim == 2
        image = Image.fromarray(value) if gray else value
        return image.resize(size, _PILLOW[how])
    if name == "convert-color":
        return cv2.cvtColor(np.asarray(value), getattr(cv2, f"COLOR_{params['format']}"))
    if name == "torch-totensor":
        pixels = np.asarray(value)
        tensor = torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1).float()
        return tensor / 255 if params.get("scale", True) else tensor
    if name == "normalize":
        mean, std = (
            torch.tensor([float(v) for v in str(params[k]).split(",")]).view(-1, 1, 1)
            for k in ("mean", "std")
        )
        return value.sub(mean).div(std)
    raise ValueError(name)
