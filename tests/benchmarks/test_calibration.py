import importlib
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from networks import residual_network

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = "calibration", "calibration_methods", "calibration_photos"
SHAPE = (1, 3, 12, 12)


@pytest.fixture(scope="module")
def scripts():
    """The benchmark's files as modules; they find each other because a script's folder is first."""
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small network, and frames on disk to calibrate it with."""
    root = tmp_path_factory.mktemp("network")
    onnx.save(residual_network(0), root / "float.onnx")
    (root / "crops").mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        np.save(root / "crops" / f"{number}.npy", random.normal(size=SHAPE).astype(np.float32))
    return root


METHODS = "kdpipe", "onnxruntime MinMax", "onnxruntime Percentile", "baked + onnxruntime MinMax"


@pytest.mark.parametrize("method", METHODS)
def test_a_process_calibrates_and_its_int8_file_is_judged(scripts, network, method, tmp_path):
    benchmark, into = scripts["calibration"], tmp_path / "int8.onnx"
    model = network / "float.onnx"
    row = benchmark.calibrated(sys.executable, method, model, network / "crops", 6, into)
    assert (row.method, row.samples, row.stopped) == (method, 6, "")
    assert 0 < row.cpu_s < 60
    assert 0 <= row.extra_mb < 1000
    kinds = {node.op_type for node in onnx.load(into).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    random = np.random.default_rng(1)
    frames = [random.normal(size=SHAPE).astype(np.float32) for _ in range(20)]
    judged = benchmark.judged(row, into, frames, benchmark.answers(model, frames))
    assert 15 < judged.db < 60
    assert judged.agreed >= 0.7
    assert 0 < judged.kl < 0.1


def test_float_against_itself_loses_nothing(scripts, network):
    benchmark, model = scripts["calibration"], network / "float.onnx"
    frames = [np.ones(SHAPE, np.float32)]
    row = benchmark.Row("none", 1, 0.0)
    judged = benchmark.judged(row, model, frames, benchmark.answers(model, frames))
    assert (judged.db, judged.agreed, judged.kl) == (np.inf, 1.0, 0.0)


def test_samples_are_read_one_by_one_and_no_more_than_asked_for(scripts, network):
    crops = scripts["calibration_methods"].Crops(network / "crops", 4)
    assert len(crops) == len(list(crops)) == 4
    assert next(iter(crops)).shape == SHAPE


def test_a_method_without_memory_is_stopped_and_another_error_is_not_hidden(
    scripts, network, monkeypatch
):
    methods = scripts["calibration_methods"]

    def failing(error):
        def calibrate(model, crops, into):
            raise error

        return lambda: calibrate

    crops = methods.Crops(network / "crops", 1)
    for error in (MemoryError(), RuntimeError("std::bad_alloc")):
        monkeypatch.setitem(methods.METHODS, "x", failing(error))
        found = methods.measure("x", network / "float.onnx", crops, network / "none")
        assert found["stopped"] == "stopped at 8 GB"
    monkeypatch.setitem(methods.METHODS, "x", failing(RuntimeError("no such operator")))
    with pytest.raises(RuntimeError, match="no such operator"):
        methods.measure("x", network / "float.onnx", crops, network / "none")


def rows(benchmark, **changed):
    """Rows that keep every bar, but for what is changed in the last of kdpipe's."""
    good = [
        benchmark.Row("kdpipe", 16, 1.0, 200.0, db=22.0, agreed=0.92, kl=0.01),
        benchmark.Row("kdpipe", 64, 2.0, 201.0, db=22.0, agreed=0.92, kl=0.01),
        benchmark.Row("onnxruntime MinMax", 16, 1.0, 150.0, db=15.0, agreed=0.84, kl=0.04),
        benchmark.Row("onnxruntime MinMax", 64, 2.0, 150.0, db=15.0, agreed=0.84, kl=0.04),
        benchmark.Row("baked + onnxruntime MinMax", 16, 1.0, 150.0, db=20.5, agreed=0.9, kl=0.01),
        benchmark.Row("baked + onnxruntime MinMax", 64, 2.0, 150.0, db=20.5, agreed=0.9, kl=0.01),
    ]
    good[1] = benchmark.replace(good[1], **changed)
    return good


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, set()),
        ({"db": 20.9}, {"64 samples: at least 21 dB"}),
        ({"agreed": 0.899}, {"64 samples: at least 90 % agreement"}),
        ({"cpu_s": 2.01}, {"64 samples: CPU seconds at most onnxruntime MinMax's"}),
        ({"extra_mb": 219.0}, set()),
        ({"extra_mb": 221.0}, {"memory grows less than 10 % from 16 to 64 samples"}),
        (
            {"extra_mb": 261.0},
            {
                "at most 260 MB above a float session",
                "memory grows less than 10 % from 16 to 64 samples",
            },
        ),
    ],
)
def test_a_bar_that_is_missed_says_so(scripts, changed, missed):
    benchmark = scripts["calibration"]
    found = benchmark.bars(rows(benchmark, **changed))
    assert len(found) == 10
    assert {bar.promise for bar in found if not bar.kept} == missed
    assert all(str(bar).startswith("NO" if bar.promise in missed else "yes") for bar in found)


@pytest.mark.parametrize(("db", "unbaked"), [(19.9, 14.0), (24.9, 20.0)])
def test_the_baked_file_is_judged_by_what_it_is_and_by_what_it_gains(scripts, db, unbaked):
    benchmark = scripts["calibration"]
    measured = rows(benchmark)
    measured[3] = benchmark.replace(measured[3], db=unbaked)
    measured[5] = benchmark.replace(measured[5], db=db)
    missed = [bar for bar in benchmark.bars(measured) if not bar.kept]
    assert [bar.promise.partition(":")[0] for bar in missed] == ["64 samples"]
    assert "baked" in missed[0].promise


def test_photographs_are_cut_the_same_every_time_and_none_serves_twice(scripts):
    pytest.importorskip("skimage")
    photos = scripts["calibration_photos"]
    assert not set(photos.CALIBRATION) & set(photos.EVALUATION)
    one, other = (list(photos.crops(photos.EVALUATION[:2], 3, seed=4)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert one[0].shape == (1, 3, 224, 224)
    assert one[0].dtype == np.float32
    assert -1 <= one[0].min() < one[0].max() <= 1
    assert not np.array_equal(one[0], one[2])  # the same photograph, another crop
