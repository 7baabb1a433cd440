"""Weights of torch networks from files that others wrote, without running code in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from pipeline.stage import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

#: Where training programs keep the weights inside a checkpoint.
_PLACES = ("state_dict", "model", "model_state_dict", "student", "teacher")

#: What wrappers put before every name: DataParallel, torch.compile, Lightning modules.
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "student.", "teacher.")


def load_weights(network: nn.Module, path: Path, what: str, *, but_head: bool = False) -> list[str]:
    """Load a file of weights into a network, in place.

    Args:
        network: to be filled.
        path: .safetensors, or what `torch.save` wrote (.pth, .pt, .ckpt); never unpickled freely.
        what: the network, in words for the messages.
        but_head: parameters of another shape stay as they are, when they are few (a head of other
            classes).

    Returns:
        Names of the parameters that stayed as they were.

    Raises:
        InputError: unreadable, or names or shapes that do not fit; says which.
    """
    weights = _read(path)
    own = network.state_dict()
    for prefix in _PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    absent = sorted(own.keys() - weights.keys())
    foreign = sorted(weights.keys() - own.keys())
    if absent or foreign:
        words = [f"lacks {', '.join(absent[:3])}"] if absent else []
        words += [f"has {', '.join(foreign[:3])}, which the network has not"] if foreign else []
        raise InputError(f"{path.name} does not fit {what}: it {' and '.join(words)}")
    other = [name for name in own if own[name].shape != weights[name].shape]
    if other and not (but_head and len(other) <= 2):
        name = other[0]
        raise InputError(
            f"{path.name} does not fit {what}: {name} is {list(weights[name].shape)}, the network "
            f"needs {list(own[name].shape)}"
        )
    network.load_state_dict({n: own[n] if n in other else weights[n] for n in own})
    return other


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise several kinds
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{path.name} is not a readable file of weights: {first[:200]}") from error
    for place in _PLACES:
        if isinstance(found, dict) and isinstance(found.get(place), dict):
            found = found[place]
    if not isinstance(found, dict) or not all(torch.is_tensor(v) for v in found.values()):
        raise InputError(f"{path.name} holds no weights by name (state_dict)")
    return found
