import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from preprocessing.int8 import (
    InputBuffer,
    OutputBuffer,
    TensorSpec,
    dequantize,
    from_device,
    quantize,
    to_device,
)

SPEC = TensorSpec(
    name="input",
    shape=(2, 7, 6, 4),
    padding=((0, 0), (1, 2), (0, 1), (0, 1)),
    scale=0.25,
    zero_point=-5,
)


def test_quantize_by_hand():
    # Ties go to the even code after the zero point is added: 0.125 / 0.25 - 5 = -4.5 -> -4.
    values = np.array([0.0, 0.125, 0.375, -0.3, 1000.0, -1000.0], np.float32)
    assert quantize(values, 0.25, -5).tolist() == [-5, -4, -4, -6, 127, -128]
    assert dequantize(np.array([-5, -4, 127], np.int8), 0.25, -5).tolist() == [0, 0.25, 33]


@given(
    hnp.arrays(np.float32, 20, elements=st.floats(-100, 100, width=32)),
    st.floats(0.01, 2),
    st.integers(-128, 127),
)
def test_a_round_trip_is_off_by_half_a_step_or_saturates(values, scale, zero_point):
    codes = quantize(values, scale, zero_point)
    back = dequantize(codes, scale, zero_point)
    inside = (codes > -128) & (codes < 127)
    assert (np.abs(back - values)[inside] <= scale * 0.5001 + 1e-4).all()
    assert (back[codes == 127] <= values[codes == 127] + scale).all()
    assert (back[codes == -128] >= values[codes == -128] - scale).all()


@given(hnp.arrays(np.int8, (2, 4, 5, 3)))
def test_codes_on_the_grid_pass_through_padding_and_layout_unchanged(codes):
    tensor = dequantize(codes.transpose(0, 3, 1, 2), SPEC.scale, SPEC.zero_point)
    device = to_device(tensor, SPEC)
    assert np.array_equal(device[:, 1:5, :5, :3], codes)
    assert np.array_equal(from_device(device, SPEC), tensor)


def test_padding_holds_the_zero_point_on_every_side():
    device = to_device(np.ones((2, 3, 4, 5), np.float32), SPEC)
    assert device.shape == (2, 7, 6, 4)
    payload = np.zeros(device.shape, bool)
    payload[:, 1:5, :5, :3] = True
    assert (device[~payload] == -5).all()
    assert (device[payload] == -1).all()


def test_a_wrong_shape_is_called_by_the_tensors_name():
    with pytest.raises(ValueError, match=r"'input' takes \(2, 4, 5, 3\)"):
        to_device(np.ones((2, 3, 5, 4), np.float32), SPEC)
    with pytest.raises(ValueError, match="'input' is"):
        from_device(np.ones((2, 7, 6, 3), np.int8), SPEC)


@given(st.integers(0, 2**32))
def test_buffers_that_are_used_again_give_what_new_ones_give(seed):
    random = np.random.default_rng(seed)
    source, target = InputBuffer(SPEC), OutputBuffer(SPEC)
    for _ in range(3):
        tensor = random.normal(0, 20, (2, 3, 4, 5)).astype(np.float32)
        kept = tensor.copy()
        codes = source.fill(tensor)
        np.testing.assert_array_equal(codes, to_device(tensor, SPEC))
        np.testing.assert_array_equal(tensor, kept)
        # Written out anew from the formula, in other steps than the code takes.
        padded = np.full(SPEC.shape, -5.0)
        exact = (tensor / np.float32(0.25) - np.float32(5)).transpose(0, 2, 3, 1)
        padded[:, 1:5, :5, :3] = np.clip(np.round(exact), -128, 127)
        np.testing.assert_array_equal(codes, padded)
        target.codes[...] = codes
        np.testing.assert_array_equal(target.read(), from_device(codes, SPEC))


def test_a_buffer_takes_one_shape():
    with pytest.raises(ValueError, match=r"takes \(2, 4, 5, 3\) \(NHWC\) before padding"):
        InputBuffer(SPEC).fill(np.zeros((2, 3, 4, 4), np.float32))
