"""Files of weights as training programs write them, and what is refused of them."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.networks.weights import load_weights
from pipeline.run.errors import InputError


def network(seed, classes=5, channels=3):
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    return nn.Sequential(stem, nn.Linear(4, classes))


def renamed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def optimizer_of(net):
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.zeros(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


WAYS = {
    "plain": lambda net, state: state,
    "DataParallel": lambda net, state: renamed(state, "module."),
    "torch.compile in Lightning": lambda net, state: {
        "state_dict": {**renamed(state, "net._orig_mod."), "criterion.weight": torch.ones(5)},
        "hyper_parameters": {"lr": 0.1},
    },
    "timm's script": lambda net, state: {
        "arch": "resnet18",
        "state_dict": state,
        "state_dict_ema": {name: value + 1 for name, value in state.items()},
        "optimizer": optimizer_of(net),
        "args": Namespace(lr=0.1),
    },
    "a name of one's own": lambda net, state: {"net": state, "acc": 0.9, "epoch": 3},
    "model_state_dict": lambda net, state: {"model_state_dict": state, "optimizer": {}},
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_found_wherever_a_program_puts_them(tmp_path, way):
    trained, fresh = network(1), network(2)
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    torch.save(WAYS[way](trained, state), tmp_path / "w.ckpt")
    load_weights(fresh, tmp_path / "w.ckpt", "the network")
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_of_several_networks_that_fit_none_is_guessed(tmp_path):
    state = network(1).state_dict()
    both = {"state_dict": {**renamed(state, "student."), **renamed(state, "teacher.")}}
    torch.save(both, tmp_path / "w.ckpt")
    with pytest.raises(InputError, match=r"\(state_dict\.student\., state_dict\.teacher\.\); wri"):
        load_weights(network(2), tmp_path / "w.ckpt", "the network")


def test_what_does_not_fit_is_named_without_its_prefix(tmp_path):
    state = renamed(network(1).state_dict(), "model.")
    state["model.extra.weight"] = state.pop("model.1.bias")
    save_file(state, tmp_path / "w.safetensors")
    words = r"w\.safetensors does not fit it: it lacks 1\.bias and has extra\.weight, which"
    with pytest.raises(InputError, match=words):
        load_weights(network(2), tmp_path / "w.safetensors", "it")


def test_a_pickled_network_is_refused_with_the_cure(tmp_path):
    torch.save(network(1), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"it holds torch\.nn\.modules\S+, which would run code; "):
        load_weights(network(2), tmp_path / "w.pth", "it")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="holds no weights by name"):
        load_weights(network(2), tmp_path / "w.pth", "it")


def test_a_head_may_differ_and_nothing_else(tmp_path):
    save_file(network(1).state_dict(), tmp_path / "w.safetensors")
    other = network(2, classes=7)
    load_weights(other, tmp_path / "w.safetensors", "it", ("1",))
    assert torch.equal(other[0][0].weight, network(1)[0][0].weight)
    with pytest.raises(InputError, match=r"1\.weight is \[5, 4\], the network"):
        load_weights(other, tmp_path / "w.safetensors", "it")
    with pytest.raises(InputError, match=r"0\.0\.weight is \[4, 3, 3, 3\], the"):
        load_weights(network(2, channels=4), tmp_path / "w.safetensors", "it", ("1",))
