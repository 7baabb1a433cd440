import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from preprocessing.apply import device_image, encode, scale, student_tensor, teacher_tensor
from preprocessing.contract import parse_contract
from preprocessing.resize import resize, resize_float
from preprocessing.student_input import StudentInput, linear_encoding


def contract_of(scaling, mu, sigma, labels=("a", "b")):
    return parse_contract(
        json.dumps(
            {
                "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 3, 8, 8]},
                "scaling": {"optical": scaling},
                "zscore": {"enabled": True, "mu": list(mu), "sigma": list(sigma)},
                "labels": list(labels),
            }
        ).encode()
    )


def as_teacher(patches, contract, bands, size):
    """What a teacher on these bands gets for patches of all bands."""
    return teacher_tensor(
        patches[..., list(bands)],
        contract.bind("optical", bands, patches.shape[-1]),
        size,
    )


LINEAR = {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]}
CLIPPED = {"type": "clip_linear", "clip": [-0.5, 0.5], "dst_range": [0, 255]}
MU, SIGMA = (11.271, 9.952, 9.206, 14.505), (3.605, 4.351, 6.044, 7.053)


def student_of(contract, bands=(2, 1, 0), size=(8, 8), patch=(8, 8), interpolation="nearest"):
    return StudentInput(
        modality="optical",
        bands=bands,
        patch_hw=patch,
        size_hw=size,
        interpolation=interpolation,
        half_pixel_centers=interpolation == "bilinear",
        device_resize=interpolation == "bilinear",
        encoding="contract",
        contract=contract.sha256,
        **linear_encoding(
            [contract.scaling_of("optical").dst_range] * len(bands),
            contract.bind("optical", bands, len(MU)),
        ),
    )


def test_scaling_by_hand():
    patches = np.array([0.0, 1.4, 2.8, 5.6]).reshape(1, 1, 1, 4)
    linear = scale(patches, contract_of(LINEAR, MU, SIGMA).scaling_of("optical"))
    assert linear.ravel().tolist() == pytest.approx([0, 127.5, 255, 510])  # no clipping
    patches = np.array([-3.0, -0.5, 0.1, 9.0]).reshape(1, 1, 1, 4)
    clipped = scale(patches, contract_of(CLIPPED, MU, SIGMA).scaling_of("optical"))
    assert clipped.ravel().tolist() == pytest.approx([0, 0, 153, 255])
    assert linear.dtype == clipped.dtype == np.float32


def test_a_teacher_gets_scale_then_zscore_in_nchw():
    contract = contract_of(LINEAR, MU, SIGMA)
    patches = np.random.default_rng(0).uniform(0, 0.3, (2, 8, 8, 4))
    tensor = as_teacher(patches, contract, (2, 0), (8, 8))
    assert tensor.shape == (2, 2, 8, 8)
    by_hand = (patches[1, 3, 5, 2] * 255 / 2.8 - 9.206) / 6.044
    assert tensor[1, 0, 3, 5] == pytest.approx(by_hand, rel=1e-5, abs=1e-5)


def test_the_callers_patches_stay_as_they_are():
    patches = np.random.default_rng(0).uniform(0, 1, (2, 4, 4, 4)).astype(np.float32)
    before = patches.copy()
    contract = contract_of(CLIPPED, MU, SIGMA)
    scale(patches, contract.scaling_of("optical"))
    encode(patches[..., :3], contract.bind("optical", (2, 1, 0), 4), student_of(contract))
    assert np.array_equal(patches, before)


@given(hnp.arrays(np.float64, (1, 4, 4, 4), elements=st.floats(0, 2.8)))
def test_zscore_can_be_undone(patches):
    contract = contract_of(LINEAR, MU, SIGMA)
    tensor = as_teacher(patches, contract, (0, 1, 2, 3), (4, 4))
    back = tensor.transpose(0, 2, 3, 1) * np.array(SIGMA) + np.array(MU)
    assert back == pytest.approx(patches * 255 / 2.8, abs=255 * 2e-6)


@given(
    hnp.arrays(np.float64, (1, 4, 4, 4), elements=st.floats(0, 2.8)),
    st.permutations(range(4)),
)
def test_permuting_bands_in_contract_and_data_together_changes_nothing(patches, order):
    bands = (2, 1, 0)
    permuted = contract_of(LINEAR, [MU[i] for i in order], [SIGMA[i] for i in order])
    moved = tuple(order.index(b) for b in bands)
    one = as_teacher(patches, contract_of(LINEAR, MU, SIGMA), bands, (4, 4))
    other = as_teacher(patches[..., order], permuted, moved, (4, 4))
    assert np.array_equal(one, other)


def test_grey_levels_are_rounded_half_to_even_and_clipped():
    contract = contract_of({**LINEAR, "src_range": [0, 255]}, MU, SIGMA)
    values = np.array([-7, 0.5, 1.5, 2.4999, 254.5, 255.4, 999]).reshape(-1, 1, 1, 1)
    patches = np.repeat(values, 4, axis=3)
    grey = encode(patches[..., :1], contract.bind("optical", (0,), 4), student_of(contract, (0,)))
    assert grey.ravel().tolist() == [0, 0, 2, 2, 254, 255, 255]


@given(hnp.arrays(np.float64, (2, 3, 3, 4), elements=st.floats(0, 2.8)))
def test_encoding_is_off_by_half_a_grey_level_at_most(patches):
    contract = contract_of(LINEAR, MU, SIGMA)
    picked = patches[..., [2, 1, 0]]
    grey = encode(picked, contract.bind("optical", (2, 1, 0), 4), student_of(contract))
    exact = scale(picked, contract.scaling_of("optical"))
    assert np.abs(grey - exact).max() <= 0.5 + 1e-4


@given(
    hnp.arrays(np.uint8, (2, 8, 8, 3)),
    st.sampled_from([(8, 8), (16, 16), (5, 9)]),
    st.sampled_from(["nearest", "bilinear"]),
)
def test_the_students_tensor_is_the_normalized_device_image_bit_for_bit(images, size, how):
    given_ = student_of(contract_of(LINEAR, MU, SIGMA), size=size, interpolation=how)
    pixels = device_image(images, given_).astype(np.float32)
    expected = (pixels - np.array(given_.mean, np.float32)) / np.array(given_.std, np.float32)
    tensor = student_tensor(images, given_)
    assert tensor.flags.c_contiguous
    assert np.array_equal(tensor, expected.transpose(0, 3, 1, 2))


@given(hnp.arrays(np.float32, (1, 4, 6, 4), elements=st.floats(0, 2.75, width=32)))
def test_nearest_resize_commutes_with_the_affine(patches):
    contract = contract_of(LINEAR, MU, SIGMA)
    after = as_teacher(patches, contract, (2, 1), (12, 18))
    before = resize_float(patches, (12, 18), "nearest")
    assert np.array_equal(after, as_teacher(before, contract, (2, 1), before.shape[1:3]))


sizes = st.integers(1, 48)


def as_pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


@given(st.data(), sizes, sizes, sizes, sizes, st.sampled_from([1, 3]))
def test_nearest_is_pillows_or_opencvs(data, height, width, new_height, new_width, channels):
    image = data.draw(hnp.arrays(np.uint8, (height, width, channels)))
    ours = resize(image[None], (new_height, new_width), "nearest", False)[0]
    theirs = np.asarray(as_pillow(image).resize((new_width, new_height), Image.Resampling.NEAREST))
    assert np.array_equal(ours, theirs.reshape(ours.shape))
    ours = resize(image[None], (new_height, new_width), "nearest", True)[0]
    theirs = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_NEAREST)
    assert np.array_equal(ours, theirs.reshape(ours.shape))


@given(st.data(), sizes, sizes, sizes, sizes, st.sampled_from([1, 3]))
def test_bilinear_without_antialias_is_opencvs(
    data, height, width, new_height, new_width, channels
):
    image = data.draw(hnp.arrays(np.uint8, (height, width, channels)))
    ours = resize(image[None], (new_height, new_width), "bilinear", True)[0]
    theirs = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(ours, theirs.reshape(ours.shape))


@given(st.data(), sizes, sizes, st.sampled_from([1, 3]))
def test_antialiased_bilinear_is_pillows(data, size, new, channels):
    image = data.draw(hnp.arrays(np.uint8, (size, size, channels)))
    ours = resize(image[None], (new, new), "bilinear", False)[0]
    theirs = np.asarray(as_pillow(image).resize((new, new), Image.Resampling.BILINEAR))
    assert np.array_equal(ours, theirs.reshape(ours.shape))


@given(st.data(), sizes, sizes, sizes, sizes)
def test_where_the_factors_differ_pillows_order_of_passes_moves_one_level(
    data, height, width, new_height, new_width
):
    image = data.draw(hnp.arrays(np.uint8, (height, width, 3)))
    ours = resize(image[None], (new_height, new_width), "bilinear", False)[0]
    theirs = np.asarray(as_pillow(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("size", [(7, 9), (64, 48), (3, 3), (1, 1)])
def test_float_bilinear_is_opencvs(size):
    image = np.random.default_rng(0).normal(size=(1, 12, 10, 3)).astype(np.float32)
    ours = resize_float(image, size, "bilinear")[0]
    theirs = cv2.resize(image[0], size[::-1], interpolation=cv2.INTER_LINEAR)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_resizing_to_the_same_size_is_free():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    assert resize(images, (4, 4), "bilinear", True) is images
