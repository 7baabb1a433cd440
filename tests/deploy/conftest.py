"""Bundles, and kdbench started from them as a device user does: a program, without kdpipe."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metis.backend import CompiledModel, QuantizedModel, open_backend
from pipeline.artifacts import Artifacts
from pipeline.delivery.bundle import assemble_bundle
from pipeline.params.benchmark import BUNDLED, BundleLimits

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes"
#: What starts the Python that runs kdbench: this one, or another machine's, say a script that runs
#: qemu-aarch64-static -L ROOT -0 "$0" ROOT/usr/bin/python3 "$@", so that Python finds itself again.
PYTHON = shlex.split(os.environ.get("KDBENCH_PYTHON", "")) or [sys.executable]


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, and its program."""

    folder: Path

    def kdbench(self, *words, fakes=FAKES, before="", **environment):
        """Run it isolated: nothing of kdpipe is in reach but what lies beside the program.

        Keyword arguments are environment variables; what lies in `fakes` is importable, and the
        line of Python in `before` comes first.
        """
        code = (
            f"import sys, runpy; {before or 'pass'}; "
            "sys.path[:0] = sys.argv[1:3]; sys.modules['pipeline'] = None; "
            "sys.modules['metis'] = None; sys.modules['torch'] = None; sys.argv = sys.argv[3:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        short = ("--min-seconds=0.2", "--min-queries=10", "--min-samples=10")
        return subprocess.run(
            [*PYTHON, "-B", "-I", "-c", code, self.folder, fakes,
             self.folder / "kdbench.py", self.folder, *short, *words],
            capture_output=True, text=True, check=False, cwd="/", timeout=600,
            env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        )  # fmt: skip

    def measured(self, *words, **environment):
        """The document of a run that measured."""
        result = self.kdbench(*words, "--json", **environment)
        assert result.returncode in (0, 7), result.stderr
        return json.loads(result.stdout)

    def edit(self, name, **changes):
        """Change fields of a JSON file, and make bundle.json agree with it."""
        path = self.folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        self.redo(name)

    def edit_arrays(self, name, **changes):
        """Change arrays of an .npz by functions, and make bundle.json agree with it."""
        with np.load(self.folder / name) as archive:
            arrays = {**archive}
        np.savez(self.folder / name, **{**arrays, **{k: f(arrays[k]) for k, f in changes.items()}})
        self.redo(name)

    def redo(self, name):
        """Make bundle.json agree with a file that was changed on purpose."""
        if name == "bundle.json":
            return
        index = json.loads((self.folder / "bundle.json").read_text())
        index["files"][name] = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        (self.folder / "bundle.json").write_text(json.dumps(index))


@pytest.fixture
def bundle(finished):
    """The one that the benchmark stage wrote; onnxruntime runs it."""
    return Bundle(finished.artifact("bundle"))


@pytest.fixture
def for_metis(finished, tmp_path):
    """Makes a bundle for axelera.runtime: padded in space, too, and with graphs for the host."""

    def make(*, batch=1, ends=False):
        place = tmp_path / f"batch{batch}{'_ends' if ends else ''}"
        paths = {name: finished.artifact(name) for name in BUNDLED}
        paths["compiled_model"] = compile_for_stand_in(paths["quantized_model"], place, batch, ends)
        inputs = Artifacts(paths, "artifacts of a bundle")
        limits = BundleLimits(logit_steps=1.0, accuracy_loss_points=50.0)
        folder = place / "bundle"
        assemble_bundle(inputs, folder, golden_samples=8, limits=limits)
        return Bundle(folder)

    return make


def compile_for_stand_in(quantized, into, batch, ends):
    """The emulator's integer graph as a folder that the stand-in of axelera.runtime loads."""
    model = QuantizedModel.load(quantized)
    emulated = open_backend("emulator").compile(model, into / "emulated", aipu_cores=batch)
    (source,), (target,) = emulated.inputs, emulated.outputs
    n, h, w, c = source.shape
    padding = ((0, 0), (1, 2), (0, 3), source.padding[3])
    source = replace(source, shape=(n, h + 3, w + 3, c), padding=padding)
    folder = into / "axelera"
    folder.mkdir()
    onnx.save(without_space(onnx.load(emulated.path / "model.onnx"), source), folder / "core.onnx")
    fields = {}
    if ends:
        # Powers of two: the host's graphs undo what the scales do, without a rounding.
        source = replace(source, scale=source.scale / 2)
        target = replace(target, scale=target.scale * 2)
        classes = target.unpadded[3]
        onnx.save(times(0.5, (1, source.unpadded[3], h, w)), folder / "pre.onnx")
        onnx.save(times(0.5, (1, classes)), folder / "post.onnx")
        fields = {"preamble": "pre.onnx", "postamble": "post.onnx"}
    made = CompiledModel(
        path=folder, entry="model.json", backend="voyager", version="stand-in", runtime="axelera",
        aipu_cores=batch, inputs=(source,), outputs=(target,), **fields,
    )  # fmt: skip
    made.save()
    (folder / "model.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps(manifest(source, target, fields)))
    return folder


def without_space(model, spec):
    """Cut the padding in space off the input before anything else happens."""
    graph = model.graph
    height, width = spec.inside[1:3]
    names = {"space_lo": [height.start, width.start], "space_hi": [height.stop, width.stop]}
    for name, values in {**names, "space_axes": [1, 2]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    graph.node.insert(
        0, helper.make_node("Slice", ["metis_in", *names, "space_axes"], ["input_int8"])
    )
    graph.input.pop()
    graph.input.append(helper.make_tensor_value_info("metis_in", TensorProto.INT8, spec.shape))
    return model


def times(factor, shape):
    """A graph for one frame that multiplies."""
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("in", "out")
    ]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["in", "factor"], ["out"])], "host", sides[:1], sides[1:],
        [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def manifest(source, target, ends):
    def flat(spec):
        return [number for pair in asdict(spec)["padding"] for number in pair]

    return {
        "manifest_version": "1.1",
        "model_lib_file": "model.json",
        "preprocess_graph": ends.get("preamble"),
        "postprocess_graph": ends.get("postamble"),
        "input_shapes": [source.shape],
        "output_shapes": [target.shape],
        "quantize_params": [[source.scale, source.zero_point]],
        "dequantize_params": [[target.scale, target.zero_point]],
        "n_padded_ch_inputs": [flat(source)],
        "n_padded_ch_outputs": [flat(target)],
        "input_tensor_layout": "NHWC",
    }
