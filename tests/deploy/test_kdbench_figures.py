"""Statistics, bounds and verdicts of kdbench, as functions."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom


@pytest.fixture(scope="module")
def figures():
    """kdbench's functions, from where they travel from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("deploy")
        import kdbench_figures

        yield kdbench_figures


@pytest.mark.parametrize(
    ("queries", "null"),
    [
        (63, ("p90", "p95", "p99", "p999")),
        (64, ("p95", "p99", "p999")),
        (129, ("p95", "p99", "p999")),
        (130, ("p99", "p999")),
        (661, ("p99", "p999")),
        (662, ("p999",)),
        (6635, ("p999",)),
        (6636, ()),
    ],
)
def test_a_percentile_of_too_few_queries_is_null(figures, queries, null):
    ns = np.random.default_rng(0).permutation(np.arange(1, queries + 1)) * 1_000_000
    row = figures.summary(ns, "scope", "host-emulation")
    for name, (quantile, _) in figures.PERCENTILES.items():
        expected = None if name in null else float(int(quantile * queries) + 1)
        assert row[name] == expected
        if name in row["bounds"]:
            assert (row["bounds"][name] is None) == (name in null)
    assert (row["min"], row["max"], row["n"]) == (1.0, float(queries), queries)


@given(st.integers(1, 5000), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_bound_is_the_largest_t_that_one_percent_allows(n, quantile):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("deploy")
        from kdbench_figures import early_stopping_bound
    found = early_stopping_bound(np.arange(n, dtype=np.float64), quantile)
    allowed = [t for t in range(n) if binom.cdf(t, n, 1 - quantile) <= 0.01]
    t = max(allowed, default=0)
    assert found == (n - t if t >= 1 else None)


def test_the_bound_of_mlperfs_minimum_is_the_slowest_query(figures):
    assert figures.early_stopping_bound(np.arange(64.0), 0.9) == 63.0
    assert figures.early_stopping_bound(np.arange(63.0), 0.9) is None


@pytest.mark.parametrize(
    ("asked", "reached", "word"),
    [
        ((60.0, 1024, 24576), (60.1, 1024, 24576), "VALID"),
        ((60.0, 1024, 24576), (59.0, 1024, 24576), "INVALID"),
        ((60.0, 1024, 24576), (60.1, 1000, 24576), "INVALID"),
        ((60.0, 1024, 24576), (60.1, 1024, 24575), "INVALID"),
        ((59.9, 1024, 24576), (59.9, 9999, 24576), "SMOKE"),
        ((60.0, 1023, 24576), (60.1, 9999, 24576), "SMOKE"),
        ((60.0, 1024, 24575), (60.1, 9999, 99999), "SMOKE"),
        ((600.0, 1024, 24576), (600.1, 5000, 99999), "VALID"),
    ],
)
def test_the_verdict_follows_what_was_asked_and_what_was_reached(figures, asked, reached, word):
    seconds, queries, samples = reached
    stream = SimpleNamespace(seconds=seconds, all_ns=np.zeros(queries))
    flood = SimpleNamespace(seconds=seconds, frames=samples)
    minima = SimpleNamespace(seconds=asked[0], queries=asked[1], samples=asked[2])
    found = figures.judge(minima, [stream], [flood], [])
    assert found["word"] == word
    assert (found["reasons"] == []) == (word == "VALID")
    assert figures.judge(minima, [stream], [flood], ["too hot"])["word"] == "INVALID"


def test_accuracy_is_the_score_and_its_loss_in_points(figures):
    random = np.random.default_rng(5)
    labels = random.integers(0, 3, 500)
    ours, reference = (np.where(random.random(500) < p, labels, 0) for p in (0.7, 0.8))
    score, below = figures.accuracy("classification", ours, labels, reference)
    assert (score.name, score.value, score.n) == ("top1", (ours == labels).mean(), 500)
    loss = 100 * ((reference == labels).mean() - (ours == labels).mean())
    assert below.pop("agreement") == (ours == reference).mean()
    assert below["loss_points"] == pytest.approx(loss)
    assert below["loss_low"] < loss < below["loss_high"]


def test_drift_and_slow_queries(figures):
    ns = np.full(1000, 2_000_000)
    ns[-100:] = 3_000_000
    ns[500] = 11_000_000
    found = figures.stability([SimpleNamespace(all_ns=ns)], [])
    assert found["drift"] == 1.5
    # Each repeat by itself: a warm end of one and a cool start of the next don't cancel.
    repeats = [SimpleNamespace(all_ns=part) for part in (ns, ns[::-1], ns // 2)]
    assert figures.stability(repeats, [])["drift"] in (1.5, 1 / 1.5)
    assert (found["slow_queries"], found["slow_limit_ms"]) == (1, 10.0)
    assert found["spread_p90"] is None


class Imagined:
    """An instance whose times are drawn: bursts of other work, and a drift of the clock."""

    def __init__(self, seed, cached):
        self.random, self.cached, self.count, self.seen = (
            np.random.default_rng(seed),
            cached,
            0,
            set(),
        )

    def query(self, tensor):
        self.count += 1
        busy = 4.0 if self.count // 40 % 4 == 1 or self.random.random() < 0.1 else 1.0
        milliseconds = (2 + self.count / 1000) * busy * self.random.lognormal(0, 0.4)
        known = tensor.tobytes() in self.seen
        self.seen.add(tensor.tobytes())
        self.all_ns = int(milliseconds * 1e6 / (self.cached if known else 1.0))


@pytest.mark.parametrize(("cached", "found_out"), [(1.0, False), (3.0, True)])
def test_kept_answers_are_found_and_noise_is_not_taken_for_them(figures, cached, found_out):
    import kdbench_audit

    groups = np.random.default_rng(0).normal(size=(7, 1, 1, 4, 8)).astype(np.float32)
    for seed in range(20):
        times = kdbench_audit.repeat_samples(Imagined(seed, cached), groups, 1.0)
        row = kdbench_audit.caching(times, "host-emulation")
        assert bool(kdbench_audit.caching_faults(row)) == found_out, row
        assert row["low"] <= row["value"] <= row["high"]


def test_rates_per_interval(figures):
    done = np.arange(1, 3001) * 1_000_000  # one call per millisecond for three seconds
    assert figures.per_interval(done, 2, 1.0) == pytest.approx([2000] * 3, rel=0.01)
    assert figures.per_interval(done[:500], 2, 1.0) == pytest.approx([2000])
