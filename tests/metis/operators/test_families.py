"""What becomes of the networks that people pick, written by hand from the rules."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from metis.operators.legalizer import legalize
from metis.operators.report import check_model
from pipeline.networks.export import export_network


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def network_of(name):
    """A network whose batch norms do something, so that no branch of it is trivially 0."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=17).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return network


#: Squeeze-and-excitation averages by ReduceMean, which is not listed; GlobalAveragePool is.
GATED = {"global pool"}

#: Network, side of its input, and the names of the rewrites that it needs.
CHIP = [
    # Convolutions, Relu, Add of two maps, MaxPool with explicit pads, one Gemm.
    slow("resnet18", 64, set()),
    # Depthwise kernels of 3 and 5, Relu, no gates.
    ("mobilenetv4_conv_small", 64, set()),
    # HardSwish and HardSigmoid come out fused; the gates are averages.
    ("mobilenetv3_small_100", 64, GATED),
    # SiLU is Sigmoid and a Mul of two maps of one shape; depthwise kernels of 3 and 5.
    slow("efficientnet_b0", 64, GATED),
    # Grouped convolutions with square kernels and strides, no gates.
    slow("regnetx_002", 64, set()),
    slow("resnet10t", 64, set()),
    slow("resnet34", 64, set()),
    slow("resnet50", 64, set()),
    slow("resnet50d", 64, set()),  # average pools in ceil mode: see below
    slow("seresnet50", 64, GATED),
    slow("res2net50_26w_4s", 64, set()),  # Split and Concat along channels
    slow("resnext50_32x4d", 64, set()),  # 32 groups, 3 x 3
    slow("regnetx_016", 64, set()),
    slow("regnety_002", 64, GATED),  # the y is for gates
    slow("regnety_016", 64, GATED),
    slow("mobilenetv4_conv_small_050", 64, set()),
    slow("mobilenetv4_conv_medium", 224, set()),
    slow("mobilenetv4_conv_large", 64, set()),
    slow("mobilenetv4_conv_aa_medium", 64, set()),  # average pools of 2 x 2 without pads
    slow("mobilenetv4_conv_blur_medium", 64, set()),  # zero pads, fixed depthwise kernels of 3 x 3
    slow("mobilenetv3_large_100", 64, GATED),
    slow("tf_mobilenetv3_large_minimal_100", 64, set()),  # minimal: no gates, Relu only
    slow("lcnet_100", 64, GATED),  # the last blocks only
    slow("mobilenetv2_100", 64, set()),  # Relu6 is Clip(0, 6)
    slow("mobileone_s0", 64, set()),  # parallel branches and Add
    slow("mnasnet_100", 64, set()),
    slow("semnasnet_100", 64, GATED),
    slow("mixnet_s", 64, GATED),  # depthwise kernels of up to 11 x 11: 121 taps of fewer than 128
    slow("rexnet_100", 64, GATED),  # Slice along channels, adds to some of them
    slow("efficientnet_b1", 64, GATED),
    slow("efficientnet_b2", 64, GATED),
    slow("efficientnet_b3", 64, GATED),
    slow("efficientnet_b4", 64, GATED),
    slow("efficientnet_lite0", 64, set()),  # lite: no gates, Relu6
    slow("tf_efficientnet_lite0", 64, set()),  # tf: zero pads at one side
    slow("efficientnet_es", 64, set()),
    slow("repvgg_a0", 64, set()),  # before it is fused: parallel branches and Add
    slow("densenet121", 64, set()),  # Concat along channels, average pools without pads
    slow("ghostnet_100", 64, GATED),  # Concat and gates; its Slice is along channels
    slow("ese_vovnet19b_dw", 64, GATED),
    slow("inception_v3", 96, set()),  # oblong kernels, not grouped; average pools count their pads
    slow("darknet53", 64, set()),  # LeakyRelu
    slow("hrnet_w18_small", 64, set()),  # Resize: nearest, asymmetric, floor, integer factors
]


@pytest.mark.filterwarnings("ignore:Constant folding")  # of torch, about blurs
@pytest.mark.parametrize(("name", "size", "rewrites"), CHIP)
def test_networks_for_the_chip(tmp_path, name, size, rewrites):
    network, path = network_of(name), tmp_path / "n.onnx"
    legalized = export_network(network, (3, size, size), path)
    assert {rewrite.name for rewrite in legalized.rewrites} == rewrites
    model = onnx.load(path)
    report = check_model(model)
    assert report.refusals == []
    assert report.share_on_chip == 1.0
    # Torch counts a multiplication and an addition as two, convolutions and products only.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    assert 2 * report.macs == counter.get_total_flops()
    tensors = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = network(tensors).numpy()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {"input": t[None].numpy()})[0] for t in tensors])
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("mobilenetv3_small_100", 18),
        slow("mobilenetv3_small_100", 11),
        slow("efficientnet_b0", 13),
        slow("ghostnet_100", 20),
        slow("densenet121", 21),
        slow("regnety_002", 18),
        slow("inception_v3", 18),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about exports of old opsets
def test_a_plain_export_with_another_opset_and_a_free_batch(tmp_path, name, opset):
    """As others write it: nothing simplified, the batch free."""
    path = tmp_path / "n.onnx"
    torch.onnx.export(
        network_of(name),
        (torch.zeros(1, 3, 96, 96),),
        str(path),
        opset_version=opset,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "N"}},
    )
    model = onnx.load(path)
    legalized = legalize(model)
    assert legalized.report.refusals == []
    assert legalized.report.share_on_chip == 1.0
    assert {"opset", "batch to 1"} <= {rewrite.name for rewrite in legalized.rewrites}
    x = np.random.default_rng(0).normal(size=(3, 3, 96, 96)).astype(np.float32)
    before, after = (
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
        for m in (model, legalized.model)
    )
    expected = before.run(None, {"x": x})[0]
    found = np.concatenate([after.run(None, {"x": row[None]})[0] for row in x])
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


#: Network, side of its input, operators among those that nothing cures.
NOT_FOR_THE_CHIP = [
    # Attention multiplies matrices and transposes; it normalizes by layer, its GELU is an Erf.
    ("vit_tiny_patch16_224", 224, {"MatMul", "Transpose", "LayerNormalization", "Erf", "Softmax"}),
    # GELU. Its layer scales of shape [C, 1, 1] are cured. In token mixers, x - norm(x).
    slow("fastvit_t8", 256, {"Erf", "Div", "Sub"}),
    # Decoupled attention has depthwise kernels of 1 x 5 and 5 x 1.
    slow("ghostnetv2_100", 224, {"Conv"}),
    slow("convnext_atto", 224, {"LayerNormalization", "Transpose", "Erf"}),
    # The hybrid ones have attention.
    slow("mobilenetv4_hybrid_medium", 224, {"MatMul", "Transpose", "Softmax"}),
    slow("mobilevit_s", 256, {"MatMul", "Transpose", "LayerNormalization", "Softmax"}),
    # Its gates run a 1-D convolution over channels, with reshapes around it.
    slow("eca_resnet33ts", 256, {"Reshape"}),
    # Attention over windows: maps become rows of tokens and back.
    slow("swin_tiny_patch4_window7_224", 224, {"MatMul", "Transpose", "Reshape", "Softmax"}),
]


@pytest.mark.filterwarnings("ignore")  # of torch's tracer, about attention
@pytest.mark.parametrize(("name", "size", "among"), NOT_FOR_THE_CHIP)
def test_networks_that_the_chip_does_not_run(tmp_path, name, size, among):
    legalized = export_network(network_of(name), (3, size, size), tmp_path / "n.onnx")
    assert among <= {node.op_type for node in legalized.report.fatal}
    assert {node.op_type for node in legalized.report.refusals if node.curable} == set()


@pytest.mark.slow
def test_average_pools_in_ceil_mode_are_doubtful(tmp_path):
    legalized = export_network(network_of("resnet50d"), (3, 64, 64), tmp_path / "n.onnx")
    doubtful = [n for n in legalized.report.nodes if n.verdict == "chip" and n.reason]
    assert {node.op_type for node in doubtful} == {"AveragePool"}
