"""Student networks by name, and their export to ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxsim
import timm
import torch
from torch import nn

from pipeline.checkpoints import load_weights
from pipeline.recipe import ALIASES
from pipeline.stage import InputError, StageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocessing.contract import StudentInput

#: What Metis compilers take; torch's newer exporter starts at 18.
OPSET = 17


def build_student(
    name: str,
    given: StudentInput,
    classes: int,
    *,
    seed: int,
    stem_stride: int | None = None,
    init: Path | None = None,
) -> nn.Module:
    """An untrained timm network for this input and number of classes; the seed gives its weights.

    Args:
        name: a network of timm, or one of ALIASES.
        given: the student's input.
        classes: of the head.
        seed: of the weights.
        stem_stride: stride of the first convolution; None: as the network has it.
        init: file of weights to start from; a head of other classes stays untrained.

    Raises:
        InputError: the network can't be built for the input, or the weights do not fit.
    """
    network_name, size = ALIASES.get(name, (name, given.size_hw[0]))
    height, width = given.size_hw
    if size != height:
        raise InputError(
            f"distill.student: {name} means {network_name} at {size}x{size}, but "
            f"ingest.student.size is {height}; change one, or write {network_name}"
        )
    torch.manual_seed(seed)
    try:
        network: nn.Module = timm.create_model(
            network_name, pretrained=False, num_classes=classes, in_chans=len(given.bands)
        )
        if stem_stride is not None:
            _set_stem_stride(network, stem_stride)
        with torch.no_grad():
            network.eval()(torch.zeros(1, len(given.bands), height, width))
    except Exception as error:  # networks refuse sizes in their own ways
        raise InputError(
            f"distill.student: {name} does not take {len(given.bands)} channels at "
            f"{height}x{width}: {error}"
        ) from error
    if init is not None:
        load_weights(network, init, f"distill.student {name}", but_head=True)
    return network


def _set_stem_stride(network: nn.Module, stride: int) -> None:
    """Small inputs lose most of their pixels in a stem of stride 2 before anything is learned."""
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    first.stride = (stride, stride)


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def export_student(network: nn.Module, given: StudentInput, path: Path) -> None:
    """Write the network as ONNX: opset 17, NCHW, batch 1, input `input`, output `logits`.

    Raises:
        StageError: the simplified graph is not proven equal to the exported one.
    """
    network.eval()
    example = torch.zeros(1, len(given.bands), *given.size_hw)
    torch.onnx.export(
        network,
        (example,),
        str(path),
        opset_version=OPSET,
        dynamo=False,
        input_names=["input"],
        output_names=["logits"],
    )
    simplified, proven = onnxsim.simplify(onnx.load(path))
    if not proven:
        raise StageError("onnxsim could not prove the simplified student equal to the exported one")
    onnx.checker.check_model(simplified, full_check=True)
    onnx.save(simplified, path)


def torch_logits(
    network: nn.Module, tensors: NDArray[np.float32], batch: int = 256
) -> NDArray[np.float32]:
    """Run the torch network in evaluation mode: (N, C, H, W) in, logits (N, classes) out."""
    network.eval()
    with torch.no_grad():
        parts = [
            network(torch.from_numpy(tensors[i : i + batch])).float().cpu().numpy()
            for i in range(0, len(tensors), batch)
        ]
    return np.concatenate(parts)
