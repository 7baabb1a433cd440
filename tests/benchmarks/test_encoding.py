import importlib.util
import statistics
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "encoding.py"


@pytest.fixture(scope="module")
def encoding():
    """The benchmark as a module; benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location("benchmark_of_encodings", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cities", ["same", "other"])
def test_truncated_carries_less_than_rounded_and_rounded_less_than_percentile(encoding, cities):
    test = getattr(encoding.make_splits(200, 160), cities)
    db = {name: encoding.sqnr_db(test, name) for name in test.tensors if name != encoding.FLOAT}
    # Errors over -1..0 instead of -0.5..0.5 grey levels: four times the mean square, 6.02 dB.
    assert db[encoding.ROUNDED] - db[encoding.TRUNCATED] == pytest.approx(6.02, abs=0.5)
    # The percentile range is about five times as narrow (14.8 to 15.7 dB measured).
    assert db[encoding.PERCENTILE] - db[encoding.ROUNDED] > 12


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_truncation_costs_more_than_rounding_and_percentile_costs_nothing(encoding):
    splits = encoding.make_splits(1700, 2000)
    exact = encoding.FLOAT
    changed = {name: [] for name in splits.same.tensors}
    cost = {name: [] for name in splits.same.tensors}
    for seed in range(5):
        network = encoding.fit(splits.train, exact, seed, epochs=8)
        decided = {
            name: encoding.decisions(network, tensor)
            for name, tensor in splits.same.tensors.items()
        }
        base = encoding.top1(decided[exact], splits.same)
        assert base > 30  # trained: chance is 6 %, measured 42 to 46
        for name, some in decided.items():
            changed[name].append(100 * (some != decided[exact]).mean())
            cost[name].append(base - encoding.top1(some, splits.same))
    # Measured per network: 14.1 to 16.8 % of the decisions, 3.3 to 4.2 %, 0.6 to 0.8 %.
    assert min(changed[encoding.TRUNCATED]) > 2 * max(changed[encoding.ROUNDED])
    assert min(changed[encoding.ROUNDED]) > 2 * max(changed[encoding.PERCENTILE])
    # Measured: 1.1 points, 0.1 and 0.0, each difference with a standard deviation of 0.8 a network.
    points = {name: statistics.mean(some) for name, some in cost.items()}
    assert points[encoding.TRUNCATED] > points[encoding.ROUNDED] + 0.3
    assert abs(points[encoding.PERCENTILE]) < 0.4
