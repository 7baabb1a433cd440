"""What quantize() makes: runs on the CPU, one frame per call, and can be saved."""

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from axelera.compiler._graphs import device_core
from axelera.compiler.told import told


def session(data):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class AxeleraQuantizedModel:
    def __init__(self, parts):
        self.parts = parts  # qdq: bytes; postamble: bytes or b""; info: JSON
        self._sessions = None

    def export(self, folder):
        told("export", OSError)
        folder = _folder(folder)
        folder.mkdir(parents=True)
        (folder / "quantized_model.onnx").write_bytes(self.parts["qdq"])
        (folder / "quantized_model.json").write_text(json.dumps(self.parts["info"]))
        if self.parts["postamble"]:
            (folder / "postprocess_graph.onnx").write_bytes(self.parts["postamble"])

    @staticmethod
    def load(folder):
        told("load", ValueError)
        folder = _folder(folder)
        after = folder / "postprocess_graph.onnx"
        return AxeleraQuantizedModel(
            {
                "qdq": (folder / "quantized_model.onnx").read_bytes(),
                "info": json.loads((folder / "quantized_model.json").read_text()),
                "postamble": after.read_bytes() if after.exists() else b"",
            }
        )

    def __call__(self, x):
        told("infer", RuntimeError)
        if os.environ.get("FAKE_RETURNS") == "torch":
            import torch

            if not isinstance(x, torch.Tensor):
                raise TypeError(f"expected a torch.Tensor, not {type(x).__name__}")
            return torch.from_numpy(self._run(x.numpy()))
        if not isinstance(x, np.ndarray):
            raise TypeError("expected a numpy array")
        return self._run(x)

    def _run(self, x):
        info = self.parts["info"]
        if x.dtype != np.float32 or list(x.shape) != info["input"]:
            raise ValueError(f"input is {x.dtype} {x.shape}, not float32 {info['input']}")
        if self._sessions is None:
            after = self.parts["postamble"]
            core, self._specs = device_core(self.parts, 1)
            self._sessions = session(core), session(after) if after else None
        core, after = self._sessions
        source, sink = self._specs
        codes = np.clip(np.round(x / source.scale + source.zero_point), -128, 127).astype(np.int8)
        codes = codes.transpose(0, 2, 3, 1)
        pads = [(source.pads[2 * d], source.pads[2 * d + 1]) for d in range(4)]
        codes = np.pad(codes, pads, constant_values=source.zero_point)
        (made,) = core.run(None, {"input": codes})
        inside = tuple(
            slice(sink.pads[2 * d], made.shape[d] - sink.pads[2 * d + 1]) for d in range(4)
        )
        real = (made[inside].astype(np.float32) - sink.zero_point) * np.float32(sink.scale)
        real = real.transpose(0, 3, 1, 2)
        if after:
            return after.run(None, {after.get_inputs()[0].name: real})[0]
        return real.reshape(info["output"])


def _folder(folder):
    kind = str if os.environ.get("FAKE_EXPORT") == "str" else Path
    if not isinstance(folder, kind):
        raise TypeError(f"expected {kind.__name__}, not {type(folder).__name__}")
    return Path(folder)
