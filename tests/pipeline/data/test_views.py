import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.views import take_view
from pipeline.params.sources import ViewParams
from preprocessing.apply import encode
from preprocessing.contract import Channels, Scaling
from preprocessing.student_input import StudentInput

PATCHES = np.random.default_rng(0).uniform(0, 1, (40, 9, 9, 2)).astype(np.float32)
ROWS = np.arange(40, dtype=np.int64) * 7


def look(view=1, seed=0, patches=PATCHES, rows=ROWS, **params):
    return take_view(patches, rows, view, ViewParams(count=8, **params), seed)


def test_view_0_is_the_patch_as_it_is():
    assert look(0) is PATCHES


def test_a_view_is_decided_by_seed_row_and_number_alone():
    whole = look(3)
    assert np.array_equal(look(3), whole)
    some = np.array([5, 11, 12])
    assert np.array_equal(look(3, patches=PATCHES[some], rows=ROWS[some]), whole[some])
    assert not np.array_equal(look(4), whole)
    assert not np.array_equal(look(3, seed=1), whole)
    assert not np.array_equal(look(3, rows=ROWS + 1), whole)


@given(st.integers(1, 7), st.integers(0, 3), st.floats(0, 0.5), st.integers(0, 4))
def test_it_commutes_with_everything_that_is_done_pixel_by_pixel(view, seed, zoom, shift):
    """So the student's 8-bit image and the teacher's float patch show the same."""
    how = {"view": view, "seed": seed, "zoom": zoom, "shift": shift}
    one = StudentInput(
        modality="optical",
        bands=(0, 1),
        patch_hw=(9, 9),
        size_hw=(9, 9),
        interpolation="nearest",
        half_pixel_centers=False,
        device_resize=False,
        encoding="contract",
        grey_lo=(0.0, 0.0),
        grey_hi=(255.0, 255.0),
        mean=(0.0, 0.0),
        std=(1.0, 1.0),
        contract="0" * 64,
    )
    channels = Channels("optical", (0,), Scaling("linear", (0.0, 1.0), (0.0, 255.0)), None)
    encoded = encode(PATCHES, channels, one)
    assert np.array_equal(look(**how, patches=encoded), encode(look(**how), channels, one))


def test_flips_and_turns_alone_are_the_eight_symmetries_of_a_square_all_of_them():
    found = look(shift=0, zoom=0.0)
    used = set()
    for patch, seen in zip(PATCHES, found, strict=True):
        turned = [np.rot90(p, k) for p in (patch, patch[:, ::-1]) for k in range(4)]
        (which,) = [i for i, one in enumerate(turned) if np.array_equal(one, seen)]
        used.add(which)
    assert len(used) == 8


def test_shifts_move_whole_pixels_and_repeat_the_edge():
    ramp = np.arange(81, dtype=np.float32).reshape(1, 9, 9, 1).repeat(40, axis=0)
    moves = set()
    for seen in look(flip=False, rotate=False, zoom=0.0, shift=2, patches=ramp)[..., 0]:
        down, right = divmod(int(seen[4, 4]) - 40 + 4 * 10, 9)
        expected = ramp[0, np.clip(np.arange(9) + down - 4, 0, 8)][
            :, np.clip(np.arange(9) + right - 4, 0, 8), 0
        ]
        assert np.array_equal(seen, expected)
        moves.add((down - 4, right - 4))
    assert {abs(m) for move in moves for m in move} == {0, 1, 2}


def test_zoom_stays_within_its_bounds():
    column = np.broadcast_to(np.arange(33, dtype=np.float32)[:, None, None], (200, 33, 33, 1))
    rows = np.arange(200, dtype=np.int64)
    seen = look(flip=False, rotate=False, shift=0, zoom=0.25, patches=column, rows=rows)
    spans = seen[:, 32, 0, 0] - seen[:, 0, 0, 0]
    assert spans.min() == pytest.approx(32 / 1.25, abs=1.01)
    assert spans.max() == 32  # smaller than the frame: the edge is repeated


def test_patches_that_are_not_square_turn_half_way_only():
    tall = np.random.default_rng(1).normal(size=(20, 6, 4, 1))
    found = look(flip=False, shift=0, zoom=0.0, patches=tall, rows=ROWS[:20])
    for patch, seen in zip(tall, found, strict=True):
        assert np.array_equal(seen, patch) or np.array_equal(seen, patch[::-1, ::-1])
