"""Settings of the SDK, and names in the folder of a model that it quantized."""

from __future__ import annotations

from typing import Any

#: Share of a chip's memory for each core; more, and four instances don't fit beside each other.
RESOURCES_PER_CORE = 0.25

#: Name of the model inside the SDK. Names of known networks would select the SDK's own presets.
MODEL_NAME = "student"

#: In the folder of a quantized model: what the SDK exported, the float ONNX, how it was made.
EXPORT, FLOAT_ONNX, RECORD = "sdk", "student.onnx", "sdk.json"


def settings_for(scheme: str, cores: int) -> dict[str, Any]:
    """What is never left to the SDK's defaults, on which its own pages disagree."""
    return {
        "model_name": MODEL_NAME,
        "scheme": scheme,
        "cores": cores,
        "resources": RESOURCES_PER_CORE * cores,
        # Relative: from an absolute one, release 1.7 was seen to make models that don't load.
        "output_dir": "compiled",
        "axm": cores == 1,  # an archive is for one core (SDK 1.7, Pipeline Builder)
    }
