import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from pipeline.networks.build import build_student, checkpoint_gradients, parameter_count
from pipeline.networks.export import export_network, export_student, torch_logits
from pipeline.networks.inference import reference_logits
from pipeline.run.errors import InputError, StageError
from preprocessing.student_input import StudentInput


def student_input(channels=3, size=16):
    return StudentInput(
        modality="optical",
        bands=tuple(range(channels)),
        patch_hw=(4, 4),
        size_hw=(size, size),
        interpolation="nearest",
        half_pixel_centers=False,
        device_resize=False,
        encoding="contract",
        grey_lo=(0.0,) * channels,
        grey_hi=(255.0,) * channels,
        mean=(128.0,) * channels,
        std=(60.0,) * channels,
        contract="0" * 64,
    )


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [("test_byobnet", 3, 16), ("resnet10t", 4, 32), ("mobilenetv3_small_050", 1, 32)],
)
def test_an_export_is_opset_17_nchw_batch_1_and_equal(tmp_path, name, channels, size):
    given = student_input(channels, size)
    network = build_student(name, given, 5, seed=1)
    path = tmp_path / "student.onnx"
    export_student(network, given, path)
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    source, sink = model.graph.input, model.graph.output
    assert [value.name for value in (*source, *sink)] == ["input", "logits"]
    shape = [d.dim_value for d in source[0].type.tensor_type.shape.dim]
    assert shape == [1, channels, size, size]
    assert [d.dim_value for d in sink[0].type.tensor_type.shape.dim] == [1, 5]
    tensors = np.random.default_rng(0).normal(size=(9, channels, size, size)).astype(np.float32)
    assert torch_logits(network, tensors, batch=4) == pytest.approx(
        reference_logits(path, tensors), abs=1e-4
    )


class Exotic(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x.flatten(2))


def test_what_torch_can_not_export_is_one_line(tmp_path):
    with pytest.raises(StageError, match=r"torch can't write the network as ONNX: .*svdvals"):
        export_network(Exotic(), (3, 8, 8), tmp_path / "n.onnx")


def test_an_export_says_what_was_rewritten_and_proves_it_on_real_inputs_too(tmp_path):
    given = student_input(1, 32)
    network = build_student("mobilenetv3_small_050", given, 5, seed=1)
    real = np.random.default_rng(0).normal(3, 9, (6, 1, 32, 32)).astype(np.float32)
    alone = export_student(network, given, tmp_path / "a.onnx")
    proven = export_student(network, given, tmp_path / "b.onnx", real)
    assert proven.inputs_tried == alone.inputs_tried + 6
    assert {rewrite.name for rewrite in proven.rewrites} == {"global pool"}
    operators = [node.op_type for node in onnx.load(tmp_path / "b.onnx").graph.node]
    assert operators.count("GlobalAveragePool") == len(proven.rewrites) + 1  # and the last pool
    assert "ReduceMean" not in operators


def test_the_seed_gives_the_weights():
    given = student_input()
    one, same, other = (build_student("test_byobnet", given, 5, seed=s) for s in (1, 1, 2))
    states = [torch.cat([p.flatten() for p in net.parameters()]) for net in (one, same, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert parameter_count(one) == states[0].numel()


def test_a_network_that_cannot_take_the_input_is_refused():
    with pytest.raises(InputError, match="inception_v3 does not take 3 channels at 16x16"):
        build_student("inception_v3", student_input(), 5, seed=0)


def test_aliases_mean_a_network_at_its_size():
    for name, size, millions in (
        ("mobilenetv3s", 32, 1.54),
        ("mobilenetv4m", 224, 8.46),
        ("efficientnet_b0", 32, 4.03),
    ):
        student = build_student(name, student_input(size=size), 17, seed=0)
        assert round(parameter_count(student) / 1e6, 2) == millions
    with pytest.raises(InputError, match="mobilenetv4m means mobilenetv4_conv_medium at 224x224"):
        build_student("mobilenetv4m", student_input(size=32), 17, seed=0)


def test_a_stem_stride_of_1_keeps_the_pixels():
    given = student_input(size=32)
    tensor = torch.zeros(1, 3, 32, 32)
    for stride, side in ((None, 16), (1, 32)):
        network = build_student("resnet18", given, 5, seed=0, stem_stride=stride)
        assert network.conv1(tensor).shape[-1] == side


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "ckpt"])
def test_a_student_starts_from_a_local_file_and_keeps_a_new_head(tmp_path, suffix):
    given = student_input()
    trained = build_student("test_byobnet", given, 5, seed=1)
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(trained.state_dict(), path)
    elif suffix == "pth":
        torch.save(trained.state_dict(), path)
    else:  # as Lightning writes it
        weights = {f"model.{name}": value for name, value in trained.state_dict().items()}
        torch.save({"state_dict": weights, "epoch": 3}, path)
    same = build_student("test_byobnet", given, 5, seed=2, init=path)
    assert all(
        torch.equal(a, b) for a, b in zip(trained.parameters(), same.parameters(), strict=True)
    )
    other = build_student("test_byobnet", given, 7, seed=2, init=path)
    assert torch.equal(next(iter(other.parameters())), next(iter(trained.parameters())))


def gradients_and_bytes_kept(network):
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network.train()(images).square().sum()
    loss.backward()
    return [p.grad for p in network.parameters()], sum(kept)


def test_checkpointed_gradients_are_the_same_for_less_memory():
    given = student_input()
    plain, saving = (build_student("test_byobnet", given, 5, seed=1) for _ in range(2))
    checkpoint_gradients(saving, "test_byobnet")
    expected, many = gradients_and_bytes_kept(plain)
    found, few = gradients_and_bytes_kept(saving)
    assert few < many / 2
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_that_cannot_checkpoint_is_refused():
    network = build_student("dla46x_c", student_input(size=32), 5, seed=1)
    with pytest.raises(InputError, match="gradient_checkpointing: timm does not offer it for dla"):
        checkpoint_gradients(network, "dla46x_c")


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger ran",)


def test_weights_that_do_not_fit_or_would_run_code_are_refused(tmp_path, capsys):
    given = student_input()
    other = build_student("test_resnet", given, 5, seed=1)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"other\.pth does not fit distill\.student test_byobnet: it"
    ):
        build_student("test_byobnet", given, 5, seed=2, init=tmp_path / "other.pth")
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth is not a readable file of weights"):
        build_student("test_byobnet", given, 5, seed=2, init=tmp_path / "evil.pth")
    assert "stranger" not in capsys.readouterr().out
