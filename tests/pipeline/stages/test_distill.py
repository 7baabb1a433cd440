from types import SimpleNamespace

import onnx
import pytest
import timm

from metis.operators.report import check_model
from pipeline.facts import ExportFacts
from pipeline.networks.names import ALIASES, timm_networks
from pipeline.params.distill import (
    DistillParams,
    FeatureParams,
    QuantizationAwareParams,
    describe_loss,
    float_phase,
)
from pipeline.params.losses import LOSSES
from pipeline.run.errors import ExtraMissingError, InputError
from pipeline.stages.distill import gates, ready


def test_the_networks_read_from_timms_source_are_those_it_registers():
    assert timm_networks() == {*timm.list_models(), *ALIASES}
    assert {network for network, _ in ALIASES.values()} <= set(timm.list_models())


GRID = QuantizationAwareParams(share=0.25)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"hard_weight": 0, "soft_weight": 0}, "nothing is left to learn"),
        ({"teacher": "mutual", "soft_weight": 0}, "teacher is mutual, but soft_weight is 0"),
        ({"teacher": "ema"}, "teacher is ema, but ema_decay is null"),
        ({"peer": "resnet18"}, "peer is for teacher: mutual only"),
        (
            {
                "teacher": "ema",
                "ema_decay": 0.9,
                "feature_weight": 1,
                "features": (FeatureParams("layer4", "a/b"),),
            },
            "feature_weight needs the ensemble's tensors",
        ),
        ({"feature_weight": 1}, "feature_weight and features go together"),
        (
            {"features": (FeatureParams("layer4", "a/b"),)},
            "feature_weight and features go together",
        ),
        (
            {"standardize_logits": True, "soft_weight": 0},
            "standardize_logits changes the soft loss",
        ),
        ({"loss": LOSSES["dkd"](), "soft_weight": 0}, "loss dkd is a soft loss"),
        ({"label_smoothing": 0.1, "hard_weight": 0}, "label_smoothing changes the cross-entropy"),
        ({"class_weights": "balanced", "sampling": "balanced"}, "both balance the classes"),
        ({"class_weights": "balanced", "hard_weight": 0}, "class_weights is for the cross-entropy"),
        ({"temperature_end": 1, "soft_weight": 0}, "temperature_end is for the soft loss"),
        ({"loss": LOSSES["dkd"](0, 0)}, "left of loss dkd: target_weight and nontarget_weight"),
        ({"loss": LOSSES["dist"](0, 0)}, "nothing is left of loss dist"),
        ({"lr_step_epochs": 3, "schedule": "plateau"}, "lr_step_epochs is for schedule step only"),
        ({"lr_patience": 1}, "lr_patience is for schedule plateau only"),
        ({"lr_gamma": 0.5}, "lr_gamma is for schedule step or plateau only"),
        ({"baselines": ("no_teacher",), "soft_weight": 0}, "baselines compares with a student"),
        ({"num_nodes": 2}, "num_nodes is for torchrun or SLURM"),
        ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs leaves no epoch"),
        (
            {"quantization_aware": QuantizationAwareParams(control=True)},
            "control is one of nothing: quantization_aware.share is 0",
        ),
        (
            {"quantization_aware": GRID, "epochs": 1},
            "share leaves no epoch to train in float first",
        ),
        (
            {"quantization_aware": GRID, "epochs": 4, "warmup_epochs": 3},
            "warmup_epochs leaves no epoch",
        ),
        (
            {"quantization_aware": GRID, "teacher": "mutual"},
            "share and teacher: mutual don't go together",
        ),
        (
            {
                "quantization_aware": GRID,
                "feature_weight": 1,
                "features": (FeatureParams("layer4", "a/b"),),
            },
            "share and feature_weight don't go together",
        ),
        ({"student": "resnet81"}, "timm has no network 'resnet81'"),
        ({"peer": "resnet81", "teacher": "mutual"}, "timm has no network 'resnet81'"),
    ],
)
def test_contradictions_are_refused(params, words, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    with pytest.raises(InputError, match=words):
        ready(DistillParams(**params))


def test_as_many_processes_as_were_started_must_be_wanted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    ready(DistillParams(devices=2, num_nodes=2))
    words = "torchrun started 4 processes, but devices times num_nodes is 1"
    with pytest.raises(InputError, match=words):
        ready(DistillParams())


@pytest.mark.parametrize(
    ("epochs", "share", "first"), [(30, 0.1, 27), (6, 0.34, 4), (3, 0.01, 2), (8, 0.0, 8)]
)
def test_the_last_part_is_the_share_of_the_epochs_and_at_least_one(epochs, share, first):
    params = DistillParams(epochs=epochs, quantization_aware=QuantizationAwareParams(share=share))
    assert float_phase(params).epochs == first


def test_the_effective_loss_is_said_in_words():
    assert describe_loss(DistillParams()) == "0.7 * CE + 0.3 * T^2 * KL, T = 2"
    given = DistillParams(
        hard_weight=0.5, soft_weight=1, loss=LOSSES["dkd"](), temperature=4, temperature_end=1
    )
    assert describe_loss(given) == "0.5 * CE + 1 * DKD, T = 4 to 1"
    assert describe_loss(DistillParams(soft_weight=0)) == "0.7 * CE"


def test_the_export_gate_wants_small_differences_and_full_agreement():
    def passed(difference, agreement):
        facts = SimpleNamespace(export=ExportFacts(difference, agreement))
        return gates(DistillParams(), facts)[0].passed

    assert passed(1e-5, 1.0)
    assert not passed(2e-3, 1.0)
    assert not passed(1e-5, 0.999)


def test_the_record_says_what_was_trained_and_that_the_export_is_equal(finished):
    facts = finished.manifest["stages"]["distill"]["facts"]
    assert facts["student"] == "test_byobnet"
    assert facts["loss"] == "0.7 * CE + 0.3 * T^2 * KL, T = 2"
    assert facts["export"]["max_abs_logit_difference"] < 1e-3
    assert facts["export"]["top1_agreement"] == 1.0
    assert facts["epochs"] == 2


def test_tensorboard_gets_every_part_of_the_loss(finished):
    (events,) = (finished.folder / "logs" / "distill-1" / "student").glob("events.out.tfevents.*")
    found = events.read_bytes()
    for tag in (b"hard_loss", b"soft_loss", b"grad_norm", b"val_top1"):
        assert found.count(tag) >= 2, tag  # epochs


def test_a_logger_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ExtraMissingError, match=r"wandb not installed; .*kdpipe\[wandb\]"):
        ready(DistillParams(loggers=("wandb",)))


def test_the_same_seed_gives_the_same_student(finished):
    before = finished.manifest["artifacts"]["student"]["sha256"]
    assert finished.kdpipe("run", "--stage", "distill", "--force").returncode == 0
    assert finished.manifest["artifacts"]["student"]["sha256"] == before


def test_a_network_that_metis_can_not_run_is_refused_before_training(project):
    """Unless somebody says that it does not matter; the record keeps what is refused."""
    words = ("run", "--to", "distill", "--set", "distill.student=test_efficientnet_gn")
    result = project.kdpipe(*words)
    assert result.returncode == 3
    assert "distill.student: Metis can't run test_efficientnet_gn:" in result.stderr
    assert "epoch" not in result.stderr
    result = project.kdpipe(*words, "--set", "distill.check_operators=false")
    assert result.returncode == 0, result.stderr
    operators = project.manifest["stages"]["distill"]["facts"]["operators"]
    assert any("InstanceNormalization" in line for line in operators["refused"])
    assert {row["name"] for row in operators["rewrites"]} == {"operand shape"}  # what can be cured


def test_the_students_graph_is_rewritten_for_the_chip_and_the_record_says_how(project):
    """The gates of MobileNetV3 are averages that are not in the list of operators."""
    result = project.kdpipe(
        "run", "--to", "distill", "--set", "distill.student=mobilenetv3_small_050"
    )
    assert result.returncode == 0, result.stderr
    operators = project.manifest["stages"]["distill"]["facts"]["operators"]
    assert (operators["refused"], operators["share_on_chip"]) == ([], 1.0)
    model = onnx.load(project.artifact("student"))
    assert check_model(model).refusals == []
    pools = [node.name for node in model.graph.node if node.op_type == "GlobalAveragePool"]
    done = [entry["node"] for entry in operators["rewrites"] if entry["name"] == "global pool"]
    assert done
    assert set(done) <= set(pools)
    for entry in operators["rewrites"]:
        assert entry["words"] == "ReduceMean -> GlobalAveragePool"
        assert entry["share_of_range"] <= 1e-5
