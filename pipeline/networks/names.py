"""Names of students: ours, timm's, and short ones."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


#: Names that users have for networks of timm, and the input size they mean by them.
ALIASES = {
    "mobilenetv4m": ("mobilenetv4_conv_medium", 224),
    "mobilenetv3s": ("mobilenetv3_small_100", 32),
}


def timm_networks() -> set[str]:
    """Names of timm's networks, read from its source: importing it would take seconds."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        return set()
    pattern = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
    modules = (Path(spec.origin).parent / "models").glob("*.py")
    networks = {name for module in modules for name in pattern.findall(module.read_text())}
    return networks | set(ALIASES)
