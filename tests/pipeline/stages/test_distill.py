import timm

from pipeline.stages.distill import DistillParams, gates, timm_networks


def test_the_networks_read_from_timms_source_are_those_it_registers():
    assert timm_networks() == set(timm.list_models())


def test_the_export_gate_wants_small_differences_and_full_agreement():
    def passed(difference, agreement):
        facts = {"export": {"max_abs_logit_difference": difference, "top1_agreement": agreement}}
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


def test_the_same_seed_gives_the_same_student(finished):
    before = finished.manifest["artifacts"]["student"]["sha256"]
    assert finished.kdpipe("run", "--stage", "distill", "--force").returncode == 0
    assert finished.manifest["artifacts"]["student"]["sha256"] == before
