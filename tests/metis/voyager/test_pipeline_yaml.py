import struct
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metis.voyager.pipeline_yaml import DevicePipeline, render_yaml, shortest_float32, yaml_obstacle
from preprocessing.student_input import StudentInput

GIVEN = StudentInput(
    modality="optical",
    bands=(2, 1, 0),
    patch_hw=(32, 32),
    size_hw=(224, 224),
    interpolation="bilinear",
    half_pixel_centers=True,
    device_resize=True,
    encoding="contract",
    grey_lo=(0.0, 0.0, 0.0),
    grey_hi=(255.0, 255.0, 255.0),
    mean=(9.206, 9.952, 11.271),
    std=(6.044, 4.351, 3.605),
    contract="ab" * 32,
)
PIPELINE = DevicePipeline(
    name="lcz",
    labels=17,
    weight_path="student.onnx",
    dataset="lcz-images",
    scheme="per_tensor_histogram",
    aipu_cores=1,
)


def operators(given_):
    """The preprocess list as (name, parameters) pairs."""
    tree = yaml.safe_load(render_yaml(given_, PIPELINE))
    steps = tree["pipeline"][0]["lcz"]["preprocess"]
    return [next(iter(step.items())) for step in steps]


def test_resize_then_tensor_then_one_normalize():
    assert operators(GIVEN) == [
        (
            "resize",
            {
                "width": 224,
                "height": 224,
                "half_pixel_centers": True,
                "interpolation": "bilinear",
            },
        ),
        ("torch-totensor", {"scale": False}),
        ("normalize", {"mean": "9.206, 9.952, 11.271", "std": "6.044, 4.351, 3.605"}),
    ]


def test_images_that_already_have_the_size_are_not_resized():
    assert [name for name, _ in operators(replace(GIVEN, device_resize=False))] == [
        "torch-totensor",
        "normalize",
    ]


def test_one_band_is_read_as_rgb_and_converted():
    gray = replace(GIVEN, bands=(3,), mean=(9.0,), std=(2.0,))
    assert operators(gray)[0] == ("convert-color", {"format": "RGB2GRAY"})
    assert operators(gray)[-1] == ("normalize", {"mean": 9, "std": 2})


@pytest.mark.parametrize("bands", [(0, 1), (0, 1, 2, 3), tuple(range(10))])
def test_bands_that_no_image_reader_gives_have_no_yaml(bands):
    assert f"sees {len(bands)} bands" in yaml_obstacle(replace(GIVEN, bands=bands))
    with pytest.raises(ValueError, match="runtime API with tensors"):
        render_yaml(replace(GIVEN, bands=bands), PIPELINE)


def test_the_sdks_strict_reader_can_take_it():
    text = render_yaml(GIVEN, PIPELINE)
    tree = yaml.safe_load(text)
    assert tree["axelera-model-format"] == "1.0.0"
    assert tree["name"]
    assert tree["description"]
    model = tree["models"]["lcz"]
    assert model["num_classes"] == 17
    assert model["input_tensor_shape"] == [1, 3, 224, 224]
    dataset = tree["datasets"][model["dataset"]]
    assert dataset["dataset_name"] == "ImageFolder"
    assert dataset["repr_imgs_dir_path"] == "lcz-images/calibration"
    assert "null" not in text
    assert "&" not in text
    assert "\t" not in text
    assert f"# preprocessing.json sha256: {GIVEN.contract}" in text


def test_compiler_settings_have_the_form_of_the_sdks_release():
    def compilation(release, cores=1):
        text = render_yaml(GIVEN, replace(PIPELINE, sdk_release=release, aipu_cores=cores))
        return yaml.safe_load(text)["models"]["lcz"]["extra_kwargs"]

    assert compilation("1.8") == {
        "compilation_config": {
            "quantization_scheme": "per_tensor_histogram",
            "aipu_cores_used": 1,
            "resources_used": 0.25,
        }
    }
    assert compilation("1.3", cores=4)["compilation_config"]["resources_used"] == 1.0
    assert compilation("1.2", cores=2) == {
        "aipu_cores": 2,
        "max_compiler_cores": 2,
        "compilation_config": {
            "quantization_config": {
                "ptq_scheme": "per_tensor_histogram",
                "quantizer_version": 2,
                "remove_quantization_of_inputs_outputs_from_graph": True,
                "quantization_debug": False,
            }
        },
    }


@pytest.mark.parametrize("prefix", ["/data/lcz", "$AXELERA_FRAMEWORK/customers/lcz/"])
def test_file_names_may_be_given_a_place(prefix):
    text = render_yaml(GIVEN, replace(PIPELINE, path_prefix=prefix))
    tree = yaml.safe_load(text)
    place = prefix.rstrip("/")
    assert tree["models"]["lcz"]["weight_path"] == f"{place}/student.onnx"
    dataset = tree["datasets"]["lcz-images"]
    assert dataset["repr_imgs_dir_path"] == f"{place}/lcz-images/calibration"
    assert dataset["labels_path"] == f"{place}/lcz-images/labels.txt"
    assert dataset["val_data"] == "val"


@given(st.floats(2**-20, 2**20, width=32))
def test_printed_numbers_read_back_as_the_same_float32(value):
    text = shortest_float32(value)
    assert np.float32(text) == np.float32(value)
    assert "e" not in text


def test_no_digit_is_wasted():
    assert shortest_float32(3.605) == "3.605"
    assert shortest_float32(struct.unpack("f", struct.pack("f", 0.1))[0]) == "0.1"
    assert shortest_float32(0.0) == "0"
