"""What decides whether finished work is used again must not change: runs would become stale."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from tiny_project import write_project

from pipeline.run.config import load_config
from pipeline.stages import load_stages

#: Keyed parameters by config and stage, as the release before parameters were Structs gave them.
RECORDED = json.loads((Path(__file__).parent / "keyed.json").read_text())
MINIMAL = {
    "ingest": {
        "data": {"train": {"path": "a.npz"}, "test": {"path": "b.npz"}},
        "teachers": [{"path": "t.onnx", "bands": [0]}],
        "student": {"bands": [0]},
    }
}
FULL = """
ingest:
  contract: p.json
  labels: l.txt
  data:
    format: npy
    modalities: {optical: x}
    labels: y
    train: {path: a, rows: [0, 10]}
    val: {path: a, indices: i.npy, labels: q}
    test: {path: a, rows: [10, 20]}
    unlabeled: {path: u}
    cache: true
    bad_patches: drop
    on_leak: error
  teachers:
    - {path: t.onnx, bands: [3, 1], modality: sar, weight: 2, resize: bilinear, zscore: graph,
       features: [a, b], recorded_top1: 0.9}
    - {timm: x, bands: [0]}
  combine: mean_probabilities
  views: {count: 3, zoom: 0}
  student: {bands: [1], encoding: percentile, percentiles: [1, 99], half_pixel_centers: true}
distill:
  loss: dkd
  target_weight: 2
  nontarget_weight: 4.5
  features: [{student: l, teacher: a/b}]
  quantization_aware: {share: 0.1, control: true}
  baselines: [no_teacher]
  loggers: [tensorboard, wandb]
  init: w.pth
  stem_stride: 1
  temperature_end: 1
calibrate:
  observer: entropy
  ranges: {"a*": mse, b: [-1, 2]}
  ranges_file: r.json
  backend: voyager
compile:
  backend: voyager
  extra: {a: {b: [1, 2.5, null]}}
  sdk_python: x/python
  route: axcompile
  try_schemes: all
  time_limit: 5
benchmark: {ssh_options: ["-p", "22"], host: u@h, min_seconds: 3}
"""
DIST = {
    **MINIMAL,
    "distill": {"loss": "dist", "inter_weight": 0, "intra_weight": 3},
    "calibrate": {"extra": {"z": 1}},
}
CONFIGS = {
    "template": files("pipeline").joinpath("templates/kdpipe.yaml").read_text(),
    "minimal": yaml.safe_dump(MINIMAL),
    "full": FULL,
    "dist": yaml.safe_dump(DIST),
}


@pytest.mark.parametrize("name", [*CONFIGS, "tiny"])
def test_keyed_parameters_are_those_of_earlier_releases(tmp_path, name, monkeypatch):
    monkeypatch.delenv("KDPIPE_SDK_PYTHON", raising=False)
    path = tmp_path / "kdpipe.yaml"
    if name == "tiny":
        path = write_project(tmp_path / "project").root / "kdpipe.yaml"
    else:
        path.write_text(CONFIGS[name])
    params = load_config(path, load_stages()).params
    keyed = {stage: json.loads(json.dumps(section.key_tree())) for stage, section in params.items()}
    assert keyed == RECORDED[name]
