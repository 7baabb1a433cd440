import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from metis.estimate.cost_model import BOARDS, load_cost_model, published_rows

PATH = Path(__file__).parents[2] / "benchmarks" / "estimator.py"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module; benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location("benchmark_of_estimates", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def rows(benchmark):
    totals = benchmark.read_totals(benchmark.FEATURES)
    return [benchmark.Row(row, totals[row.network]) for row in published_rows()]


def test_the_committed_constants_are_the_fit_of_the_committed_features(benchmark, rows):
    fitted, committed = benchmark.fit(rows), load_cost_model()
    for name in benchmark.FITTED:
        assert getattr(committed, name) == pytest.approx(getattr(fitted, name), rel=1e-3)


def test_left_out_rows_are_predicted_as_well_as_asked(benchmark, rows):
    errors = benchmark.left_out(rows, by_family=False)
    naive = benchmark.left_out(rows, by_family=False, fit_and_predict=benchmark.fit_naive)
    for board in BOARDS:
        size = np.abs(errors[board])
        assert np.median(size) <= 6
        assert np.percentile(size, 90) <= 20
        assert (size <= 20).sum() >= 23
        assert np.median(np.abs(naive[board])) > 70


def test_the_band_is_that_of_families_left_out(benchmark, rows):
    errors = benchmark.left_out(rows, by_family=True)
    for board in BOARDS:
        factor = load_cost_model().error_factor[board]
        assert factor == pytest.approx(benchmark.error_factor(errors[board]), abs=1e-3)
        within = np.abs(np.log1p(np.array(errors[board]) / 100)) <= np.log(factor) + 1e-3
        assert within.sum() >= 23


def test_the_fit_finds_the_constants_that_made_the_figures(benchmark, rows):
    """Rows whose published figures are computed from known constants give these back."""
    from dataclasses import replace

    truth = replace(load_cost_model(), tiles=3.0, weights=0.02, operators=4.0, bandwidth=20.0)
    made = [
        replace(
            row,
            published=replace(
                row.published, fps={board: benchmark.predict(truth, row, board) for board in BOARDS}
            ),
        )
        for row in rows
    ]
    found = benchmark.fit(made)
    for name in benchmark.FITTED:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-2)


def test_the_study_and_we_count_nearly_the_same(benchmark):
    ours, study = (benchmark.read_totals(path) for path in (benchmark.FEATURES, benchmark.STUDY))
    assert ours.keys() == study.keys()
    for network, total in ours.items():
        for name in benchmark.QUANTITIES:
            theirs = getattr(study[network], name)
            assert getattr(total, name) == pytest.approx(theirs, rel=0.02), (network, name)
