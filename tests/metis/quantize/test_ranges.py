"""Observers and the ranges they choose."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import residual_network

from metis.backend import OBSERVERS
from metis.quantize.folding import prepare
from metis.quantize.observers import BINS, Histogram, find_range, min_max, mse, percentile
from metis.quantize.placement import open_observations
from metis.quantize.ranges import RangeError, Ranges, choose, grid

RANDOM = np.random.default_rng


def histogram(values, parts=1):
    found = Histogram()
    for part in np.array_split(np.asarray(values, np.float32), parts):
        found.add(part[None])
    return found


def error(values, lo, hi):
    """Mean squared error of the values on the grid of a range."""
    scale, zero = grid(lo, hi)
    codes = np.clip(np.rint(values / scale) + zero, -128, 127)
    return float(np.square((codes - zero) * scale - values).mean())


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=200),
    parts=st.integers(1, 7),
)
def test_extremes_are_exact_and_counts_do_not_depend_on_the_parts(values, parts):
    together, apart = histogram(values), histogram(values, min(parts, len(values)))
    assert (together.lo, together.hi) == (min(values), max(values))
    assert together.counts.sum() == apart.counts.sum() == len(values)
    assert together.reach == apart.reach
    assert np.array_equal(together.counts, apart.counts)
    assert len(together.counts) == BINS


@given(lo=st.floats(-1e5, 1e5), width=st.floats(1e-3, 1e5))
def test_the_grid_spans_the_range_and_holds_zero(lo, width):
    hi = lo + width
    scale, zero = grid(lo, hi)
    assert -128 <= zero <= 127
    ends = (-128 - zero) * scale, (127 - zero) * scale
    assert ends[0] == pytest.approx(min(lo, 0), abs=float(scale))
    assert ends[1] == pytest.approx(max(hi, 0), abs=float(scale))


@pytest.mark.parametrize("bad", [(1.0, -1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_what_is_no_range_is_refused(bad):
    with pytest.raises(RangeError, match="is no range"):
        grid(*bad)


def test_nothing_but_zeros_has_a_grid():
    assert grid(*min_max(histogram(np.zeros(50)))) == (1.0, -128)
    assert grid(*mse(histogram(np.zeros(50)))) == (1.0, -128)


DISTRIBUTIONS = {
    "normal": lambda r: r.normal(0, 1, 40_000),
    "heavy tails": lambda r: r.standard_t(3, 40_000),
    "relu": lambda r: np.maximum(r.normal(0, 1, 40_000), 0),
    "relu6 with a heap at 6": lambda r: np.clip(r.normal(3, 4, 40_000), 0, 6),
    "negative": lambda r: -r.gamma(2, 1, 40_000),
    "one outlier": lambda r: np.append(r.normal(0, 1, 40_000), 300.0),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_mse_is_no_worse_than_any_other_observer(kind):
    values = DISTRIBUTIONS[kind](RANDOM(0)).astype(np.float32)
    seen = histogram(values)
    errors = {name: error(values, *find_range(name, seen)) for name in OBSERVERS}
    assert errors["mse"] <= 1.02 * min(errors.values())


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("name", OBSERVERS)
def test_a_range_lies_within_what_was_seen_and_holds_zero(kind, name):
    values = DISTRIBUTIONS[kind](RANDOM(0)).astype(np.float32)
    lo, hi = find_range(name, histogram(values))
    assert min(values.min(), 0) <= lo <= 0 <= hi <= max(values.max(), 0)
    # A sensible range keeps 20 dB of anything that is not an outlier.
    if kind not in ("one outlier", "heavy tails"):
        assert error(values, lo, hi) < 0.01 * np.square(values).mean()


def test_the_percentile_leaves_the_outermost_out():
    values = np.append(RANDOM(0).normal(0, 1, 100_000), [500.0])
    _, hi = percentile(histogram(values))
    assert hi < 10
    assert min_max(histogram(values))[1] == 500


@pytest.fixture
def seen():
    watched = open_observations(prepare(residual_network(0)))
    watched.add(RANDOM(0).normal(0, 1.5, (40, 3, 12, 12)).astype(np.float32), lambda n: None)
    return watched


def test_one_pass_sees_what_numpy_sees(seen):
    assert seen.samples == 40
    frames = RANDOM(0).normal(0, 1.5, (40, 3, 12, 12)).astype(np.float32)
    ranges = choose(seen, "min_max")
    assert ranges.of("input").seen == (float(frames.min()), float(frames.max()))
    assert np.allclose(seen.means("input"), frames.mean(axis=(0, 2, 3)), atol=1e-5)
    channels = ranges.of("a2").channels  # what the depthwise convolution reads
    assert len(channels) == 24
    assert max(hi for _, hi in channels) == pytest.approx(ranges.of("a2").hi)
    assert "c2" not in ranges.tensors  # the Relu after it is part of the convolution


def test_the_state_does_not_grow_with_the_samples(seen):
    def size(observer):
        return sum(h.counts.nbytes for h in observer.histograms.values())

    before = size(seen)
    seen.add(RANDOM(1).normal(0, 30, (100, 3, 12, 12)).astype(np.float32), lambda n: None)
    assert size(seen) == before == len(seen.histograms) * BINS * 8


def test_ranges_survive_the_file(seen, tmp_path):
    ranges = choose(seen, "mse", {"a*": "percentile", "logits": (-4.0, 5.0)})
    assert ranges.of("a1").observer == "percentile"
    assert ranges.of("sum").observer == "mse"
    assert (ranges.of("logits").lo, ranges.of("logits").hi) == (-4.0, 5.0)
    assert ranges.of("logits").observer == "given"
    ranges.check(seen)
    ranges.save(tmp_path / "ranges.json")
    assert Ranges.load(tmp_path / "ranges.json") == ranges


def test_an_override_that_fits_nothing_is_refused(seen):
    with pytest.raises(RangeError, match="'conv_9' fits no tensor of the student; it has 'input'"):
        choose(seen, "mse", {"conv_9": "min_max"})
    with pytest.raises(RangeError, match=r"'logit' fits no tensor .*; did you mean 'logits'"):
        choose(seen, "mse", {"logit": "min_max"})


@pytest.mark.parametrize("bad", [(3.0, 1.0), (0.0, 1e30), (float("nan"), 1.0)])
def test_a_range_given_to_a_tensor_that_is_none_is_refused_by_name(seen, bad):
    with pytest.raises(RangeError, match=r"tensor 'a1': .* is no range"):
        choose(seen, "mse", {"a1": bad})


def test_a_given_range_is_for_all_channels(seen):
    """Under the hybrid scheme too, where the observed extremes of each channel would count."""
    assert len(choose(seen, "mse").of("a2").channels) == 24
    assert choose(seen, "mse", {"a2": (0.0, 2.0)}).of("a2").channels == ()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw["tensors"]["a1"].update(lo=3.0, hi=1.0), "tensor 'a1': lo 3 and hi 1"),
        (lambda raw: raw["tensors"]["a1"].update(hi=1e39), "tensor 'a1': lo .* are no range"),
        (lambda raw: raw["tensors"]["a1"].update(hi=float("nan")), "tensor 'a1': lo .* nan are no"),
        (lambda raw: raw["tensors"]["a1"].pop("lo"), "tensor 'a1': Object missing .*`lo`"),
        (lambda raw: raw["tensors"]["a1"].update(hi=None), r"tensor 'a1': Expected `float`.*\$.hi"),
        (lambda raw: raw["tensors"]["a2"]["channels"][0].append(1), "tensor 'a2': .*channels"),
        (lambda raw: raw["tensors"]["a2"]["channels"].pop(), "'a2' has 24 channels, .* of 23"),
        (lambda raw: raw["tensors"].pop("a1"), "no range for tensor 'a1'"),
        (lambda raw: raw["tensors"].update(a9=raw["tensors"]["a1"]), "the student has no .*'a9'"),
        (lambda raw: raw.pop("tensors"), "no file of ranges: .*`tensors`"),
        (lambda raw: raw.update(schema=2), "no file of ranges: Invalid enum value 2"),
    ],
)
def test_a_damaged_file_is_refused_by_name(seen, tmp_path, damage, words):
    path = tmp_path / "ranges.json"
    choose(seen, "mse").save(path)
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(RangeError, match=words):
        Ranges.load(path).check(seen)


def test_what_is_no_json_or_no_file_is_refused_by_name(tmp_path):
    (tmp_path / "bad.json").write_text("{bad")
    with pytest.raises(RangeError, match=r"bad\.json is no file of ranges: Expecting property"):
        Ranges.load(tmp_path / "bad.json")
    with pytest.raises(RangeError, match=r"can't be read: Is a directory"):
        Ranges.load(tmp_path)
