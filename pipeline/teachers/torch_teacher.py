"""Torch networks as teachers: timm by name, weights from a file or a hub, frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from huggingface_hub import constants, get_session

from pipeline.networks.weights import load_weights
from pipeline.run.errors import InputError, near_names
from pipeline.teachers.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from pipeline.params.sources import TeacherParams
    from preprocessing.contract import Channels, Contract


#: A hub that does not answer in this time is taken as not there.
_REACH_SECONDS = 5.0


def open_torch_teacher(
    path: Path | None, params: TeacherParams, contract: Contract, channels: Channels
) -> Teacher:
    """Open a timm network with its trained weights: evaluation mode, no gradients.

    Args:
        path: .pth, .pt, .ckpt or .safetensors; None: the weights that a hub has for it.
        params: how it is described in kdpipe.yaml; `timm` is set.
        contract: gives the number of classes and the input size.
        channels: its bands.

    Raises:
        InputError: no such network, weights that do not fit, a head of other classes, no network.
    """
    assert params.timm is not None
    network = _download(params) if path is None else _from_file(path, params, contract)
    network.eval().requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with_features = _WithFeatures(network, params).to(device)

    def infer(tensor: NDArray[Any]) -> list[NDArray[Any]]:
        with torch.inference_mode():
            outputs = with_features(torch.from_numpy(tensor).to(device))
        return [value.float().cpu().numpy() for value in outputs]

    return Teacher(
        name=path.stem if path else params.timm.rpartition("/")[2],
        files=(path,) if path else (),
        params=params,
        channels=channels,
        size_hw=contract.size_hw,
        layout="NCHW",
        batch=None,
        dtype=np.float32,
        opset=None,
        ending="logits",
        infer=infer,
    )


def write_onnx(path: Path, params: TeacherParams, contract: Contract, dest: Path) -> int:
    """Write a torch teacher as ONNX, batch 1; return its number of parameters."""
    network = _from_file(path, params, contract).eval()
    example = torch.zeros(1, len(params.bands), *contract.size_hw)
    torch.onnx.export(network, (example,), str(dest), opset_version=17, dynamo=False)
    return sum(parameter.numel() for parameter in network.parameters())


def _from_file(path: Path, params: TeacherParams, contract: Contract) -> nn.Module:
    assert params.timm is not None
    try:
        network: nn.Module = timm.create_model(
            params.timm, num_classes=len(contract.labels), in_chans=len(params.bands)
        )
    except Exception as error:  # timm and the networks refuse in their own ways
        raise InputError(f"ingest.teachers.timm: {params.timm}: {error}") from error
    load_weights(network, path, f"timm network {params.timm}")
    return network


def _download(params: TeacherParams) -> nn.Module:
    """Weights from a hub; never with a head that was not trained for these classes."""
    assert params.timm is not None
    try:
        get_session().head(constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception:  # noqa: BLE001 - its client changed its library, and so its exceptions
        constants.HF_HUB_OFFLINE = True  # what was fetched before serves; no minute of retries
    try:
        network: nn.Module = timm.create_model(params.timm, pretrained=True)
    except Exception as error:  # the hub's client raises in many ways
        raise InputError(
            f"ingest.teachers.timm: the weights of {params.timm} can't be fetched (no network?): "
            f"{type(error).__name__}; give a file with `path`"
        ) from error
    channels = next(p.shape[1] for p in network.parameters() if p.ndim == 4)
    if channels != len(params.bands):
        raise InputError(
            f"ingest.teachers.timm: {params.timm} was trained on {channels} channels, but its "
            f"bands in kdpipe.yaml are {list(params.bands)}"
        )
    return network


class _WithFeatures(torch.nn.Module):
    """The network with a list of outputs: logits, then those of the modules `params.features`."""

    def __init__(self, network: nn.Module, params: TeacherParams) -> None:
        super().__init__()
        self._network = network
        self._features: list[torch.Tensor | None] = [None] * len(params.features)
        modules = dict(network.named_modules())
        for number, name in enumerate(params.features):
            if name not in modules or not name:
                raise InputError(
                    f"ingest.teachers.features: {params.timm} has no module {name!r}; near are "
                    f"{near_names(name, modules)}"
                )
            modules[name].register_forward_hook(self._keeper(number))

    def _keeper(self, number: int) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            self._features[number] = output

        return keep

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        logits = self._network(tensor)
        return [logits, *(feature for feature in self._features if feature is not None)]
