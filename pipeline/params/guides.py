"""Settings of other distillation code, told in kdpipe's words."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any, Literal

from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


#: What others call a key of `distill`, in lower case.
_NAMES = {
    "temperature": "temperature",
    "distillation_temperature": "temperature",
    "feature_weight": "feature_weight",
    "feature_loss_weight": "feature_weight",
    "student_model": "student",
    "student": "student",
    "epochs": "epochs",
    "num_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_epochs": "warmup_epochs",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "lr_gamma": "lr_gamma",
    "lr_step_size": "lr_step_epochs",
    "label_smoothing": "label_smoothing",
}

#: What the guide that names these models recommends; the student's size is that with 1000 classes.
PRESETS: dict[str, dict[str, Any]] = {
    "b4-to-b0": {"student": "efficientnet_b0", "temperature": 4.0, "alpha": 0.7, "million": 5.29},
    "b3-to-b1": {"student": "efficientnet_b1", "temperature": 5.0, "alpha": 0.75, "million": 7.79},
}

#: Its ranges; alpha is the weight of the teacher there.
TEMPERATURES = (3.0, 10.0)

SOFT_WEIGHTS = (0.5, 0.9)

_ALPHAS = ("alpha", "distillation_alpha", "kd_alpha")

_SWITCHES = ("use_distillation", "enabled")


def convert(
    path: Path, alpha_is: Literal["hard", "soft"] | None
) -> tuple[dict[str, Any], list[str]]:
    """Read somebody's config.py or YAML, without running it, as the section `distill`.

    Args:
        path: Python assignments of literals, or YAML.
        alpha_is: whose weight their alpha is: that of the labels, or that of the teacher. Guides
            differ, and the number alone does not tell.

    Returns:
        The section, and the names that have no counterpart.

    Raises:
        InputError: unreadable, or an alpha whose meaning nobody said.
    """
    settings = _flat(_load_settings(path))
    section: dict[str, Any] = {}
    unknown = []
    for name, value in settings.items():
        key = name.rpartition(".")[2].lower()
        if key in _NAMES:
            section[_NAMES[key]] = value
        elif key in _ALPHAS:
            section.update(_weights(path, name, value, alpha_is))
        elif key not in _SWITCHES:
            unknown.append(name)
    switches = {n: v for n, v in settings.items() if n.rpartition(".")[2].lower() in _SWITCHES}
    if any(value is False for value in switches.values()):
        section.update(hard_weight=1.0, soft_weight=0.0)
        section.pop("feature_weight", None)
    return section, unknown


def preset(name: str) -> dict[str, Any]:
    """One of PRESETS as the section `distill`."""
    values = PRESETS[name]
    soft: float = values["alpha"]
    return {
        "student": values["student"],
        "temperature": values["temperature"],
        "hard_weight": round(1 - soft, 10),
        "soft_weight": soft,
    }


def unusual(section: dict[str, Any]) -> list[str]:
    """What of a section lies outside the ranges that guides recommend; nothing is wrong with it."""
    words = []
    for key, (low, high) in (("temperature", TEMPERATURES), ("soft_weight", SOFT_WEIGHTS)):
        value = section.get(key)
        if isinstance(value, int | float) and not low <= value <= high and value != 0:
            words.append(f"{key} {value:g} lies outside the usual {low:g} to {high:g}")
    return words


def _weights(path: Path, name: str, value: Any, alpha_is: str | None) -> dict[str, float]:  # noqa: ANN401 - theirs
    if alpha_is is None:
        raise InputError(
            f"{path.name}: {name} = {value} is the weight of the labels in some guides and that of "
            "the teacher in others; say which: --alpha-is hard or --alpha-is soft"
        )
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{path.name}: {name} is {value!r}; a weight from 0 to 1 is needed")
    hard = value if alpha_is == "hard" else 1 - value
    return {"hard_weight": round(hard, 10), "soft_weight": round(1 - hard, 10)}


def _load_settings(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text()
        tree = _assignments(text) if path.suffix == ".py" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, SyntaxError, yaml.YAMLError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path.name} is not a readable config: {first}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path.name} holds no names with values")
    return tree


def _assignments(text: str) -> dict[str, Any]:
    values = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # computed: it would have to be run
                continue
    return values


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
