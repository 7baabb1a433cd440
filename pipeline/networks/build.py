"""Student networks by name, and their export to ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import timm
import torch
from torch import nn

from pipeline.networks.names import ALIASES
from pipeline.networks.weights import load_weights
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from preprocessing.student_input import StudentInput


def build_student(
    name: str,
    student_input: StudentInput,
    classes: int,
    *,
    seed: int,
    stem_stride: int | None = None,
    init: Path | None = None,
) -> nn.Module:
    """An untrained timm network for this input and number of classes; the seed gives its weights.

    Args:
        name: a network of timm, or one of ALIASES.
        student_input: the student's input.
        classes: of the head.
        seed: of the weights.
        stem_stride: stride of the first convolution; None: as the network has it.
        init: file of weights to start from; a head of other classes stays untrained.

    Raises:
        InputError: the network can't be built for the input, or the weights do not fit.
    """
    network_name, size = ALIASES.get(name, (name, student_input.size_hw[0]))
    height, width = student_input.size_hw
    if size != height:
        raise InputError(
            f"distill.student: {name} means {network_name} at {size}x{size}, but "
            f"ingest.student.size is {height}; change one, or write {network_name}"
        )
    try:
        network = create_network(
            network_name,
            (len(student_input.bands), height, width),
            classes,
            seed=seed,
            stem_stride=stem_stride,
        )
    except InputError as error:
        raise InputError(f"distill.student: {error}") from error
    if init is not None:
        head = timm.get_pretrained_cfg_value(network_name, "classifier") or ()
        heads = (head,) if isinstance(head, str) else head
        load_weights(network, init, f"distill.student {name}", heads)
    return network


def create_network(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    seed: int,
    stem_stride: int | None = None,
) -> nn.Module:
    """An untrained timm network that takes inputs of shape (C, H, W).

    Raises:
        InputError: it does not take them.
    """
    channels, height, width = shape
    torch.manual_seed(seed)
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=classes, in_chans=channels
        )
        if stem_stride is not None:
            _set_stem_stride(network, stem_stride)
        with torch.no_grad():
            network.eval()(torch.zeros(1, *shape))
    except Exception as error:  # networks refuse sizes in their own ways
        words = str(error) or type(error).__name__
        raise InputError(
            f"{name} does not take {channels} channels at {height}x{width}: {words}"
        ) from error
    return network


def _set_stem_stride(network: nn.Module, stride: int) -> None:
    """Small inputs lose most of their pixels in a stem of stride 2 before anything is learned."""
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    first.stride = (stride, stride)


def checkpoint_gradients(network: nn.Module, name: str) -> None:
    """Let the network forget activations inside its blocks and compute them again going back.

    The gradients stay the same; running means of batch normalization move twice per step.

    Raises:
        InputError: timm can't do it with this network.
    """
    try:
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise InputError(
            f"distill.gradient_checkpointing: timm does not offer it for {name}; set it to false, "
            "or choose another network"
        ) from error


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
