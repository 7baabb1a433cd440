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
    own = network.state_dict()
    weights = _belonging(_read(path), set(own), path)
    absent = sorted(own.keys() - weights.keys())
    foreign = sorted(weights.keys() - own.keys())
    if absent or foreign:
        words = [f"lacks {', '.join(absent[:3])}"] if absent else []
        words += [f"has {', '.join(foreign[:3])}, which the network has not"] if foreign else []
        raise InputError(f"{path.name} does not fit {what}: it {' and '.join(words)}")
    other = [name for name in own if own[name].shape != weights[name].shape]
    for name in other:
        if not name.startswith(tuple(f"{module}." for module in head)):
            raise InputError(
                f"{path.name} does not fit {what}: {name} is {list(weights[name].shape)}, the "
                f"network needs {list(own[name].shape)}"
            )
    network.load_state_dict({n: own[n] if n in other else weights[n] for n in own})


def _belonging(found: dict[str, Tensor], own: set[str], path: Path) -> dict[str, Tensor]:
    """The tensors under the prefix that fits a network's names best, without it.

    Raises:
        InputError: several prefixes fit equally, and none is the usual place.
    """
    counts: dict[str, int] = {}
    for given in found:
        parts = given.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                prefix = ".".join([*parts[:i], ""])
                counts[prefix] = counts.get(prefix, 0) + 1
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most] or [""]
    usual = [prefix for prefix in best if prefix.startswith(_PLACES)]
    if most == len(own) and len(best) > 1 and len(usual) != 1:
        raise InputError(
            f"{path.name} holds several networks that fit ({', '.join(sorted(best))}); write the "
            "weights of one into a file of its own"
        )
    prefix = (usual or best)[0]
    return {n.removeprefix(prefix): value for n, value in found.items() if n.startswith(prefix)}


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file; its name is the way to it, joined by dots."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise several kinds
        raise InputError(f"{path.name} is not a readable file of weights: {_why(error)}") from error
    found = dict(_tensors(whole, ""))
    if not found:
        raise InputError(f"{path.name} holds no weights by name (state_dict)")
    return found


def _tensors(tree: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _why(error: Exception) -> str:
    text = str(error).strip()
    held = re.search(r"GLOBAL ([\w.]+) was not", text)
    if held:
        return (
            f"it holds {held[1]}, which would run code; save the weights alone: "
            "torch.save(network.state_dict(), FILE)"
        )
    return first_line(error)[:200]
