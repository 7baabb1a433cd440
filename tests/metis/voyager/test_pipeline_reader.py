from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from voyager_interpreter import interpret

from metis.voyager.pipeline_reader import Pipeline, PipelineError, pipeline_differences
from metis.voyager.pipeline_yaml import DevicePipeline, render_yaml
from preprocessing.apply import exported_images, student_tensor
from preprocessing.images import write_png
from preprocessing.student_input import StudentInput

PIPELINE = DevicePipeline(
    name="lcz",
    labels=17,
    weight_path="student.onnx",
    dataset="lcz-images",
    scheme="per_tensor_histogram",
    aipu_cores=1,
)

#: The operator as render_yaml writes it for given_of().
NORMALIZE = """- normalize:
            mean: 9.206, 9.952, 11.271
            std: 6.044, 4.351, 3.605"""


def given_of(channels=3, patch=8, size=20, interpolation="bilinear", half=True, resize=True):
    return StudentInput(
        modality="optical",
        bands=tuple(range(channels)),
        patch_hw=(patch, patch),
        size_hw=(size, size),
        interpolation=interpolation,
        half_pixel_centers=half,
        device_resize=resize,
        encoding="contract",
        grey_lo=(0.0,) * channels,
        grey_hi=(255.0,) * channels,
        mean=(9.206, 9.952, 11.271)[:channels],
        std=(6.044, 4.351, 3.605)[:channels],
        contract="ab" * 32,
    )


def random_images(count=3, channels=3, size=8):
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, size, size, channels)).astype(np.uint8)


HOW = [
    ("bilinear", True, True),
    ("bilinear", False, True),
    ("nearest", False, False),
    ("nearest", True, False),
    ("bilinear", True, False),
]


@pytest.mark.parametrize(("interpolation", "half", "resize"), HOW)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [20, 5, 8])
def test_three_ways_to_the_tensor_are_one(tmp_path, interpolation, half, resize, channels, size):
    """Training's way; our reader of the YAML; and one that shares no code with either."""
    given_ = given_of(channels, 8, size, interpolation, half, resize)
    images = random_images(3, channels)
    trained = student_tensor(images, given_)
    exported = exported_images(images, given_)
    text = render_yaml(given_, PIPELINE)
    assert np.array_equal(Pipeline(text).tensor(exported), trained)
    files = []
    for i, image in enumerate(exported):
        files.append(tmp_path / f"{i}.png")
        write_png(image, files[-1])
    assert np.abs(interpret(text, files) - trained).max() <= 1e-5
    assert pipeline_differences(Pipeline(text), given_) == []


@given(
    st.lists(st.floats(0.001, 300), min_size=3, max_size=3),
    st.lists(st.floats(0.001, 300), min_size=3, max_size=3),
)
def test_whatever_the_statistics_the_yaml_says_them_exactly(mean, std):
    given_ = replace(given_of(resize=False, size=8), mean=tuple(mean), std=tuple(std))
    images = random_images()
    read = Pipeline(render_yaml(given_, PIPELINE)).tensor(images)
    assert np.array_equal(read, student_tensor(images, given_))


SABOTAGE = {
    "channels swapped": (
        ("mean: 9.206, 9.952, 11.271", "mean: 11.271, 9.952, 9.206"),
        "normalize.mean is 11.271, 9.952, 9.206, needed is 9.206, 9.952, 11.271",
    ),
    "no z-score": (
        ("        - normalize:\n            mean: 9.206, 9.952, 11.271\n"
         "            std: 6.044, 4.351, 3.605\n", ""),
        "preprocess is resize, torchtotensor; needed is resize, torchtotensor, normalize",
    ),
    "z-score twice": (
        ("      postprocess:", "        - normalize:\n            mean: 9.206, 9.952, 11.271\n"
         "            std: 6.044, 4.351, 3.605\n      postprocess:"),
        "preprocess is resize, torchtotensor, normalize, normalize; needed is",
    ),
    "scaled by 255": (("scale: False", "scale: True"), "torchtotensor.scale is True, needed is"),
    "nearest for bilinear": (
        ("interpolation: bilinear", "interpolation: nearest"),
        "resize.interpolation is nearest, needed is bilinear",
    ),
    "other centers": (
        ("half_pixel_centers: True", "half_pixel_centers: False"),
        "resize.half_pixel_centers is False, needed is True",
    ),
    "BGR": (("color_format: RGB\n      pre", "color_format: BGR\n      pre"),
            "input.color_format is BGR, needed is RGB"),
    "a BGR model": (
        ("input_color_format: RGB", "input_color_format: BGR"),
        "input_color_format is BGR, needed is RGB",
    ),
    "another size": (("width: 20", "width: 21"), "resize.width is 21, needed is 20"),
    "another shape": (("[1, 3, 20, 20]", "[1, 3, 20, 24]"), "input_tensor_shape is [1, 3, 20, 24]"),
    "a last digit": (("3.605", "3.606"), "normalize.std is 6.044, 4.351, 3.606, needed is"),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_named_by_its_field(name):
    (old, new), words = SABOTAGE[name]
    given_ = given_of()
    text = render_yaml(given_, PIPELINE)
    assert old in text
    pipeline = Pipeline(text.replace(old, new))
    assert any(words in found for found in pipeline_differences(pipeline, given_))


@pytest.mark.parametrize("name", [n for n in SABOTAGE if n not in ("a BGR model", "another shape")])
def test_sabotage_changes_the_tensor_too(name):
    """The numbers alone would have told, without a look at the fields."""
    (old, new), _ = SABOTAGE[name]
    given_ = given_of()
    images = random_images()
    trained = student_tensor(images, given_)
    pipeline = Pipeline(render_yaml(given_, PIPELINE).replace(old, new))
    read = pipeline.tensor(images)
    assert read.shape != trained.shape or np.abs(read - trained).max() > 1e-5


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("pipeline:", "pipelin:", "not a pipeline with one task"),
        ("- torch-totensor:\n            scale: False\n", "- to-tensor:\n", "operator totensor is"),
        ("mean: 9.206, 9.952, 11.271", "mean: a, b, c", "is not numbers"),
        ("mean: 9.206, 9.952, 11.271", "mean: 9.2, 9.9", "has 2 values for 3 channels"),
        ("            width: 20\n", "", "is not width and height"),
        ("color_format: RGB\n      pre", "color_format: HSV\n      pre", "HSV is not RGB or BGR"),
    ],
)
def test_what_cannot_be_read_is_refused(old, new, words):
    text = render_yaml(given_of(), PIPELINE)
    assert old in text
    with pytest.raises(PipelineError, match=words):
        Pipeline(text.replace(old, new)).tensor(random_images())


def test_operators_out_of_place_are_refused():
    text = render_yaml(given_of(), PIPELINE)
    swapped = text.replace("- torch-totensor:\n            scale: False", "- X").replace(
        NORMALIZE,
        "- torch-totensor:\n            scale: False",
    )
    swapped = swapped.replace("- X", "- normalize:\n            mean: 1\n            std: 2")
    with pytest.raises(PipelineError, match="normalize stands before torch-totensor"):
        Pipeline(swapped).tensor(random_images())
    with pytest.raises(PipelineError, match="no torch-totensor"):
        Pipeline(text.split("        - torch-totensor")[0] + "models: {lcz: {}}").tensor(
            random_images()
        )


def test_linear_scaling_divides_and_shifts():
    text = render_yaml(given_of(resize=False, size=8), PIPELINE).replace(
        NORMALIZE,
        "- linear-scaling:\n            mean: 2, 4, 5\n            shift: 1",
    )
    images = random_images()
    expected = images.transpose(0, 3, 1, 2) / np.array([2, 4, 5]).reshape(1, 3, 1, 1) + 1
    assert Pipeline(text).tensor(images) == pytest.approx(expected)
