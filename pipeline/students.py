"""Student networks by name, and their export to ONNX."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxsim
import timm
import torch
from torch import nn

from metis.legalizer import RewriteError, legalize
from pipeline.checkpoints import load_weights
from pipeline.recipe import ALIASES
from pipeline.stage import InputError, StageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from metis.legalizer import Legalized
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
    try:
        network = create_network(
            network_name,
            (len(given.bands), height, width),
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


def export_student(
    network: nn.Module,
    given: StudentInput,
    path: Path,
    tensors: NDArray[np.float32] | None = None,
) -> Legalized:
    """Write a network for the student's input as ONNX. See `export_network`."""
    return export_network(network, (len(given.bands), *given.size_hw), path, tensors)


def export_network(
    network: nn.Module,
    shape: tuple[int, int, int],
    path: Path,
    tensors: NDArray[np.float32] | None = None,
) -> Legalized:
    """Write a network as ONNX in the form that the chip takes: opset 17, NCHW, batch 1.

    Its input is `input`, its output `logits`.

    Args:
        network: of torch.
        shape: of its input, (C, H, W).
        path: the file to write.
        tensors: (N, C, H, W), real inputs on which the rewrites for the chip are proven too.

    Returns:
        What was rewritten for the chip, and what of it is refused all the same.

    Raises:
        StageError: torch can't export the network, or the simplified or the rewritten graph is not
            proven equal to the exported one.
    """
    network.eval()
    try:
        with _silent_exporter():
            torch.onnx.export(
                network,
                (torch.zeros(1, *shape),),
                str(path),
                opset_version=OPSET,
                dynamo=False,
                input_names=["input"],
                output_names=["logits"],
            )
    except torch.onnx.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise StageError(f"torch can't write the network as ONNX: {first[:200]}") from error
    simplified, proven = onnxsim.simplify(onnx.load(path))
    if not proven:
        raise StageError("onnxsim could not prove the simplified student equal to the exported one")
    try:
        legalized = legalize(simplified, [] if tensors is None else list(tensors[:, None]))
    except RewriteError as error:
        raise StageError(f"the student's graph, rewritten for the chip: {error}") from error
    onnx.checker.check_model(legalized.model, full_check=True)
    onnx.save(legalized.model, path)
    return legalized


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Keep standard output for what kdpipe has to say.

    On an error torch prints its whole graph from C++, past sys.stdout; and it warns that shapes
    become constants, which is what we want.
    """
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


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
