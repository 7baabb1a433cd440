"""Weights of torch networks from files that others wrote, without running code in them."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from pipeline.run.errors import InputError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn


#: Where training programs keep the weights that they mean; an average (state_dict_ema) beside them
#: is not taken.
_PLACES = ("state_dict.", "model.", "model_state_dict.")

# Checkpoints of timm's own training script hold its options so; it is a plain bag of values.
torch.serialization.add_safe_globals([Namespace])


def load_weights(network: nn.Module, path: Path, what: str, head: Sequence[str] = ()) -> None:
    """Load a file of weights into a network, in place.

    The weights may lie anywhere inside a checkpoint and have any prefix (DataParallel,
    torch.compile, Lightning modules); what else it holds, such as an optimizer, is not looked at.

    Args:
        network: to be filled.
        path: .safetensors, or what `torch.save` wrote (.pth, .pt, .ckpt); never unpickled freely.
        what: the network, in words for the messages.
        head: modules whose parameters stay as they are where the file's have another shape (a head
            of other classes).

    Raises:
        InputError: unreadable, or names or shapes that do not fit; says which.
    """
    parameters = network.state_dict()
    weights = _strip_prefix(_load_tensors(path), set(parameters), path)
    absent = sorted(parameters.keys() - weights.keys())
    foreign = sorted(weights.keys() - parameters.keys())
    if absent or foreign:
        words = [f"lacks {', '.join(absent[:3])}"] if absent else []
        words += [f"has {', '.join(foreign[:3])}, which the network has not"] if foreign else []
        raise InputError(f"{path.name} does not fit {what}: it {' and '.join(words)}")
    reshaped = [name for name in parameters if parameters[name].shape != weights[name].shape]
    for name in reshaped:
        if not name.startswith(tuple(f"{module}." for module in head)):
            raise InputError(
                f"{path.name} does not fit {what}: {name} is {list(weights[name].shape)}, the "
                f"network needs {list(parameters[name].shape)}"
            )
    network.load_state_dict({n: parameters[n] if n in reshaped else weights[n] for n in parameters})


def _strip_prefix(tensors: dict[str, Tensor], names: set[str], path: Path) -> dict[str, Tensor]:
    """The tensors under the prefix that fits a network's names best, without it.

    Raises:
        InputError: several prefixes fit equally, and none is the usual place.
    """
    counts: dict[str, int] = {}
    for name in tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                prefix = ".".join([*parts[:i], ""])
                counts[prefix] = counts.get(prefix, 0) + 1
    fitting = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == fitting] or [""]
    usual = [prefix for prefix in best if prefix.startswith(_PLACES)]
    if fitting == len(names) and len(best) > 1 and len(usual) != 1:
        raise InputError(
            f"{path.name} holds several networks that fit ({', '.join(sorted(best))}); write the "
            "weights of one into a file of its own"
        )
    prefix = (usual or best)[0]
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file; its name is the way to it, joined by dots."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise several kinds
        raise InputError(f"{path.name} is not a readable file of weights: {_why(error)}") from error
    tensors = dict(_tensors(checkpoint, ""))
    if not tensors:
        raise InputError(f"{path.name} holds no weights by name (state_dict)")
    return tensors


def _tensors(tree: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _why(error: Exception) -> str:
    text = str(error).strip()
    refusal = re.search(r"GLOBAL ([\w.]+) was not", text)
    if refusal:
        return (
            f"it holds {refusal[1]}, which would run code; save the weights alone: "
            "torch.save(network.state_dict(), FILE)"
        )
    return first_line(error)[:200]
