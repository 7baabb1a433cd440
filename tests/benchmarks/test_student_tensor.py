import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocessing.apply import student_tensor

PATH = Path(__file__).parents[2] / "benchmarks" / "student_tensor.py"
#: More than are handled at a time, and no multiple of it.
COUNT = 19


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module; benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location("benchmark_of_student_tensor", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_the_contenders_compute_the_same(benchmark, images, interpolation):
    ours = student_tensor(images, benchmark.student_input(interpolation, False))
    chain = benchmark.public_chain(interpolation)
    theirs = torch.stack([chain(benchmark.Image.fromarray(image)) for image in images])
    # The chain divides by 255 first, so float32 rounds elsewhere (values up to 70, 8e-6 measured).
    assert np.abs(ours - theirs.numpy()).max() < 1e-4


@pytest.mark.parametrize("half_pixel_centers", [False, True])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_no_temporary_is_larger_than_the_batch(
    benchmark, images, interpolation, half_pixel_centers
):
    given = benchmark.student_input(interpolation, half_pixel_centers)
    output = student_tensor(images, given).nbytes
    assert benchmark.temporary_bytes(lambda: student_tensor(images, given)) < output


@pytest.mark.parametrize("half_pixel_centers", [False, True])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_an_image_does_not_depend_on_its_batch(
    benchmark, images, interpolation, half_pixel_centers
):
    given = benchmark.student_input(interpolation, half_pixel_centers)
    alone = [student_tensor(image[None], given) for image in images]
    assert np.array_equal(student_tensor(images, given), np.concatenate(alone))
