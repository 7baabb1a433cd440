"""A stand-in of the SDK's deploy.py: reads the pipeline YAML as its calibration does."""

import argparse
import sys
from pathlib import Path

import yaml
from axelera.compiler import CompilerConfig, compile, quantize

sys.path.insert(0, str(Path(__file__).parents[2]))
from voyager_interpreter import interpret

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path)
parser.add_argument("--mode", choices=["PREQUANTIZED", "QUANTIZE", "QUANTCOMPILE"], required=True)
parser.add_argument("--num-cal-images", type=int, default=200)
parser.add_argument("--pipe")
parser.add_argument("--build-root", type=Path)
parser.add_argument("--data-root", type=Path)
parser.add_argument("--aipu-cores", type=int)
args = parser.parse_args()

text = args.file.read_text()
tree = yaml.safe_load(text)
assert tree["name"] == args.file.stem
((name, model),) = tree["models"].items()
dataset = tree["datasets"][model["dataset"]]
assert (args.data_root / dataset["data_dir_name"] / dataset["val_data"]).is_dir()
images = sorted((args.file.parent / dataset["repr_imgs_dir_path"]).iterdir())
if len(images) < args.num_cal_images:
    sys.exit(f"ERROR: {len(images)} calibration images, {args.num_cal_images} asked for")
tensors = interpret(text, images[: args.num_cal_images])
config = CompilerConfig(**model["extra_kwargs"]["compilation_config"])
assert config.meaning("aipu_cores_used") == args.aipu_cores
quantized = quantize(str(args.file.parent / model["weight_path"]), iter(tensors[:, None]), config)
folder = args.build_root / tree["name"] / name
quantized.export(folder / "quantized")
compile(quantized, config, folder / str(args.aipu_cores))
print("INFO: deployed")
