"""CompilerConfig as pydantic would make it: unknown words are passed over in silence."""

import os
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

from axelera.compiler._release import RELEASE


class Scheme(Enum):
    HISTOGRAM = "per_tensor_histogram"
    MIN_MAX = "per_tensor_min_max"
    HYBRID = "hybrid_per_tensor_per_channel"


#: field -> (type, default); the documented names.
_FIELDS = {
    "model_name": (str, ""),
    "quantization_scheme": (Scheme, Scheme.MIN_MAX),
    "aipu_cores_used": (int, 4),
    "resources_used": (float, 1.0),
    "output_dir": (Path, Path()),
    "tiling_depth": (int, 1),
    "mvm_utilization_limit": (float, 1.0),
    "multicore_mode": (str, "multiprocess"),
}

#: The other names that pages of the documentation give to the same fields.
_SHORT = {
    "aipu_cores_used": "aipu_cores",
    "resources_used": "resources",
    "quantization_scheme": "ptq_scheme",
}


def _model_fields():
    """FAKE_NAMES: nothing, "short" (other field names), or "alias" (only the alias is heard)."""
    how = os.environ.get("FAKE_NAMES", "")
    fields = {}
    for name, (kind, default) in _FIELDS.items():
        short = _SHORT.get(name)
        field = SimpleNamespace(kind=kind, default=default, alias=None, validation_alias=None)
        if short and how == "alias":
            field.alias = short
        fields[short if short and how == "short" else name] = field
    if RELEASE >= (1, 7):
        fields["output_axm_format"] = SimpleNamespace(
            kind=bool, default=False, alias=None, validation_alias=None
        )
    return fields


class CompilerConfig:
    model_fields = _model_fields()

    def __init__(self, **words):
        for name, field in self.model_fields.items():
            value = words.get(field.alias or name, field.default)
            if name == os.environ.get("FAKE_DEAF"):
                value = field.default
            if field.kind is bool and not isinstance(value, bool):
                raise ValueError(f"1 validation error for CompilerConfig\n{name}\n  not a bool")
            setattr(self, name, field.kind(value))

    def meaning(self, documented):
        """The value of a field by its documented name."""
        for name in (documented, _SHORT.get(documented, documented)):
            if name in self.model_fields:
                value = getattr(self, name)
                return value.value if isinstance(value, Enum) else value
        return None
