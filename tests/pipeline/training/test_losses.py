from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, softmax
from scipy.stats import pearsonr, zscore

from pipeline.params.distill import DistillParams
from pipeline.params.losses import LOSSES
from pipeline.params.sources import UNLABELED
from pipeline.training.losses.dist import dist_loss
from pipeline.training.losses.dkd import dkd_loss
from pipeline.training.losses.features import feature_loss
from pipeline.training.losses.hard import hard_loss
from pipeline.training.losses.kl import kl_loss
from pipeline.training.losses.softening import loss_function, standardize_logits
from pipeline.training.module import temperature_at

temperatures = st.floats(0.5, 8.0)
#: Most laws hold for three losses, each of them a few dozen calls into torch.
few = settings(max_examples=15)


@st.composite
def batches(draw):
    """Logits of a student and a teacher, (N, classes) in float64, and labels, some unknown."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(2, 6)))
    logits = hnp.arrays(np.float64, shape, elements=st.floats(-9, 9, width=32))
    labels = hnp.arrays(np.int64, shape[:1], elements=st.integers(UNLABELED, shape[1] - 1))
    return draw(logits), draw(logits), draw(labels)


def random_batch(rows=7, classes=5, seed=0):
    random = np.random.default_rng(seed)
    student, teacher = random.normal(0, 3, (2, rows, classes))
    return student, teacher, random.integers(0, classes, rows)


def value(loss, *arrays, **how):
    """What a loss says of numpy arrays."""
    return loss(*(torch.tensor(a) for a in arrays), **how).item()


def kl(student, teacher, **how):
    return kl_loss(student, teacher, None, **how)


def dist(student, teacher, **how):
    return dist_loss(student, teacher, None, **how)


def gradient(loss, student, *others, **how):
    """What it sends into the student."""
    student = torch.tensor(student, requires_grad=True)
    loss(student, *(torch.tensor(o) for o in others), **how).backward()
    return student.grad.numpy()


#: Every soft loss, with the weights that are its defaults.
SOFT = {name: partial(loss_function(kind()), **kind().weights) for name, kind in LOSSES.items()}
every_soft_loss = pytest.mark.parametrize("loss", SOFT.values(), ids=SOFT)


# The formulas of the papers in float64, by their definitions.


def divergence(p, q):
    """KL(p || q) of distributions along the last axis."""
    return (p * (np.log(p) - np.log(q))).sum(axis=-1)


def reference_soft(student, teacher, temperature):
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    return temperature**2 * divergence(p, q).mean()


def reference_decoupled(student, teacher, labels, temperature, alpha, beta):
    losses = []
    for z, v, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(v / temperature), softmax(z / temperature)
        rest_p, rest_q = np.delete(p, label), np.delete(q, label)
        target = divergence(np.array([p[label], rest_p.sum()]), np.array([q[label], rest_q.sum()]))
        others = divergence(rest_p / rest_p.sum(), rest_q / rest_q.sum())
        losses.append(alpha * target + beta * others)
    return temperature**2 * np.mean(losses)


def reference_relational(student, teacher, temperature, beta, gamma):
    p, q = softmax(student / temperature, axis=1), softmax(teacher / temperature, axis=1)
    rows = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - pearsonr(a, b).statistic for a, b in zip(p.T, q.T, strict=True)])
    return temperature**2 * (beta * rows + gamma * columns)


# Labels


def test_the_hard_loss_is_the_mean_negative_log_likelihood():
    logits, _, labels = random_batch()
    expected = -log_softmax(logits, axis=1)[np.arange(7), labels].mean()
    assert value(hard_loss, logits, labels) == pytest.approx(expected)


def test_smoothed_labels_spread_their_share_over_all_classes():
    logits, _, labels = random_batch()
    targets = 0.9 * np.eye(5)[labels] + 0.1 / 5
    expected = -(targets * log_softmax(logits, axis=1)).sum(axis=1).mean()
    assert value(hard_loss, logits, labels, label_smoothing=0.1) == pytest.approx(expected)


def test_weights_of_classes_make_it_a_weighted_mean():
    logits, _, labels = random_batch()
    labels[2] = UNLABELED
    weights = np.array([0.5, 1.0, 2.0, 4.0, 0.25])
    known = labels != UNLABELED
    losses = -log_softmax(logits, axis=1)[np.arange(7), labels][known]
    found = value(hard_loss, logits, labels, class_weights=torch.tensor(weights))
    assert found == pytest.approx(np.average(losses, weights=weights[labels[known]]))


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double()])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_what_has_no_label_contributes_nothing(weights, smoothing):
    how = {"class_weights": weights, "label_smoothing": smoothing}
    logits, _, labels = random_batch()
    labels[[1, 4]] = UNLABELED
    known = labels != UNLABELED
    expected = value(hard_loss, logits[known], labels[known], **how)
    assert value(hard_loss, logits, labels, **how) == pytest.approx(expected)
    assert not gradient(hard_loss, logits, labels, **how)[~known].any()


@pytest.mark.parametrize("weights", [None, torch.ones(5)])
def test_a_batch_without_labels_costs_nothing_and_can_be_trained_on(weights):
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.full((3,), UNLABELED)
    loss = hard_loss(logits, labels, class_weights=weights, label_smoothing=0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 5))


def test_a_batch_of_classes_without_weight_is_no_division_by_zero():
    weights = torch.tensor([0.0, 1.0])
    assert hard_loss(torch.randn(3, 2), torch.zeros(3).long(), class_weights=weights).item() == 0


# Hinton's soft targets


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_the_soft_loss_is_hintons(temperature):
    student, teacher, _ = random_batch()
    found = value(kl, student, teacher, temperature=temperature)
    assert found == pytest.approx(reference_soft(student, teacher, temperature), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_two_classes_by_hand(temperature):
    p, q = 1 / (1 + np.exp(-3 / temperature)), 1 / (1 + np.exp(1 / temperature))
    expected = temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    found = value(kl, np.array([[0.0, 1.0]]), np.array([[3.0, 0.0]]), temperature=temperature)
    assert found == pytest.approx(expected)


def test_it_is_the_divergence_from_the_teacher_and_not_the_other_way():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    forward = kl(student, teacher, temperature=1.0).item()
    p = 1 / (1 + np.exp(-4.0))
    assert forward == pytest.approx(p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p)), rel=1e-5)
    assert forward != pytest.approx(kl(teacher, student, temperature=1.0).item(), rel=0.05)


@pytest.mark.parametrize("name", ["kl", "dkd"])
def test_gradients_keep_their_size_at_any_temperature(name):
    student, teacher, labels = random_batch(rows=64)
    norms = [
        np.linalg.norm(gradient(SOFT[name], 0.03 * student, 0.03 * teacher, labels, **how))
        for how in ({"temperature": t} for t in (2.0, 4.0, 8.0))
    ]
    assert max(norms) / min(norms) < 1.2


@few
@given(batches(), temperatures)
def test_the_soft_gradient_is_the_difference_of_the_distributions(batch, temperature):
    student, teacher, _ = batch
    q, p = softmax(student / temperature, axis=1), softmax(teacher / temperature, axis=1)
    found = gradient(kl, student, teacher, temperature=temperature)
    assert found == pytest.approx(temperature * (q - p) / len(student), abs=1e-9)


# Decoupled


@few
@given(batches(), temperatures, st.floats(0, 3), st.floats(0, 10))
def test_the_dkd_loss_is_that_of_its_paper(batch, temperature, alpha, beta):
    student, teacher, labels = batch
    found = value(
        dkd_loss,
        *batch,
        temperature=temperature,
        target_weight=alpha,
        nontarget_weight=beta,
    )
    targets = np.where(labels == UNLABELED, teacher.argmax(axis=1), labels)
    expected = reference_decoupled(student, teacher, targets, temperature, alpha, beta)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_its_weights_are_one_and_eight_by_default():
    batch = random_batch()
    expected = reference_decoupled(*batch, 4.0, 1.0, 8.0)
    assert value(dkd_loss, *batch, temperature=4.0) == pytest.approx(expected)


@few
@given(batches(), temperatures)
def test_weighted_by_what_the_teacher_leaves_to_the_others_it_is_the_soft_loss(batch, temperature):
    for student, teacher, label in zip(*(np.split(part, len(part)) for part in batch), strict=True):
        target = teacher.argmax() if label[0] == UNLABELED else label[0]
        found = value(
            dkd_loss,
            student,
            teacher,
            label,
            temperature=temperature,
            nontarget_weight=1 - softmax(teacher / temperature)[0, target],
        )
        expected = reference_soft(student, teacher, temperature)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_two_classes_leave_nothing_to_divide_among_the_others():
    batch = random_batch(classes=2)
    found = value(dkd_loss, *batch, temperature=2.0, target_weight=0.0)
    assert found == pytest.approx(0, abs=1e-12)


def test_a_student_that_is_utterly_wrong_still_has_a_finite_loss():
    """A thousand nats off, where probabilities in float32 are 0 and 1."""
    student = torch.tensor([[-1000.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1000.0, 0.0, 0.0]])
    loss = dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1000 + np.log(2))
    assert student.grad[0].tolist() == pytest.approx([-1.0, 0.5, 0.5])


# Relations


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
def test_the_relational_loss_is_that_of_its_paper(temperature, beta, gamma):
    student, teacher, _ = random_batch()
    found = value(
        dist,
        student,
        teacher,
        temperature=temperature,
        inter_weight=beta,
        intra_weight=gamma,
    )
    expected = reference_relational(student, teacher, temperature, beta, gamma)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_rows_only_relate_up_to_scale_and_shift(temperature):
    """Half-way to the uniform distribution every row is an affine map of itself."""
    _, teacher, _ = random_batch()
    p = softmax(teacher / temperature, axis=1)
    student = temperature * np.log(0.5 * p + 0.5 / 5)
    how = {"temperature": temperature}
    assert value(dist, student, teacher, intra_weight=0.0, **how) == pytest.approx(0)
    assert value(kl, student, teacher, **how) > 0.01


def test_columns_only_relate_up_to_scale_and_shift():
    """Half-way to any one distribution every column is an affine map of itself."""
    _, teacher, _ = random_batch()
    student = np.log(0.5 * softmax(teacher, axis=1) + 0.5 * np.array([0.6, 0.1, 0.1, 0.1, 0.1]))
    found = value(dist, student, teacher, temperature=1.0, inter_weight=0.0)
    assert found == pytest.approx(0)
    assert value(dist, student, teacher, temperature=1.0) > 0.01


def test_one_patch_has_no_relation_to_others():
    student, teacher, _ = random_batch(rows=1)
    both, rows = (
        value(dist, student, teacher, temperature=2.0, intra_weight=weight) for weight in (1.0, 0.0)
    )
    assert both == rows > 0


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@every_soft_loss
def test_constant_rows_and_columns_leave_everything_finite(loss, who, standardize):
    flat, varied = torch.full((4, 5), 0.1), torch.randn(4, 5)
    student = (flat if who in ("student", "both") else varied).clone().requires_grad_()
    teacher = flat if who in ("teacher", "both") else varied
    found = loss(
        student, teacher, torch.tensor([0, 1, 2, -1]), temperature=2.0, standardize=standardize
    )
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(student.grad).all()


# Standardised logits


def test_standardised_rows_are_z_scores():
    logits, _, _ = random_batch()
    found = standardize_logits(torch.tensor(logits)).numpy()
    assert found == pytest.approx(zscore(logits, axis=1))


@every_soft_loss
def test_a_loss_of_standardised_logits_is_that_of_their_z_scores(loss):
    student, teacher, labels = random_batch()
    found = value(loss, student, teacher, labels, temperature=3.0, standardize=True)
    scores = zscore(student, axis=1), zscore(teacher, axis=1)
    assert found == pytest.approx(value(loss, *scores, labels, temperature=3.0))
    assert found != pytest.approx(value(loss, student, teacher, labels, temperature=3.0), rel=0.01)


@few
@given(st.integers(0, 99), st.floats(0.1, 50), st.floats(-20, 20), st.floats(0.1, 50), temperatures)
@every_soft_loss
def test_standardised_neither_scale_nor_shift_of_logits_matters(
    loss, seed, scale, shift, other_scale, temperature
):
    student, teacher, labels = random_batch(seed=seed)
    how = {"temperature": temperature, "standardize": True}
    moved = scale * student + shift, other_scale * teacher - shift
    expected = value(loss, student, teacher, labels, **how)
    assert value(loss, *moved, labels, **how) == pytest.approx(expected, rel=1e-4)


# Features


def test_features_of_one_size_are_compared_one_by_one():
    own, other = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 5))
    assert value(feature_loss, own, other) == pytest.approx(((own - other) ** 2).mean())
    own, other = own[..., 0, 0], other[..., 0, 0]
    assert value(feature_loss, own, other) == pytest.approx(((own - other) ** 2).mean())


def test_features_of_different_sizes_are_averaged_to_the_smaller():
    random = np.random.default_rng(0)
    large, small = random.normal(size=(2, 3, 6, 8)), random.normal(size=(2, 3, 2, 4))
    averaged = large.reshape(2, 3, 2, 3, 4, 2).mean(axis=(3, 5))
    expected = pytest.approx(((averaged - small) ** 2).mean())
    assert value(feature_loss, large, small) == expected
    assert value(feature_loss, small, large) == expected


def test_each_side_of_a_map_has_its_own_smaller_size():
    random = np.random.default_rng(0)
    tall, wide = random.normal(size=(2, 3, 4, 2)), random.normal(size=(2, 3, 2, 6))
    shortened = tall.reshape(2, 3, 2, 2, 2).mean(axis=3)
    narrowed = wide.reshape(2, 3, 2, 2, 3).mean(axis=4)
    expected = ((shortened - narrowed) ** 2).mean()
    assert value(feature_loss, tall, wide) == pytest.approx(expected)


def test_a_map_beside_a_vector_becomes_one():
    random = np.random.default_rng(0)
    maps, vectors = random.normal(size=(2, 3, 4, 5)), random.normal(size=(2, 3))
    expected = pytest.approx(((maps.mean(axis=(2, 3)) - vectors) ** 2).mean())
    assert value(feature_loss, maps, vectors) == expected
    assert value(feature_loss, vectors, maps) == expected


@pytest.mark.parametrize("shape", [(2, 24), (2, 24, 4, 4)])
def test_features_of_different_depth_need_an_adapter(shape):
    with pytest.raises(ValueError, match=r"24 channels.* 96; .*adapter"):
        feature_loss(torch.zeros(shape), torch.zeros(2, 96))


# What all of them promise


@every_soft_loss
def test_no_gradient_flows_into_the_teacher(loss):
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 3, UNLABELED])
    for standardize in (False, True):
        loss(student, teacher, labels, temperature=2.0, standardize=standardize).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 6, 6)])
def test_no_gradient_flows_into_the_teachers_features(shape):
    student, teacher = torch.randn(3, 4, 2, 2, requires_grad=True), torch.randn(shape)
    teacher.requires_grad_()
    feature_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@few
@given(batches(), temperatures)
@every_soft_loss
def test_no_loss_is_negative(loss, batch, temperature):
    assert value(loss, *batch, temperature=temperature) >= -1e-9


@pytest.mark.parametrize("standardize", [False, True])
@every_soft_loss
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(loss, standardize):
    logits, _, labels = random_batch()
    how = {"temperature": 3.0, "standardize": standardize}
    assert value(loss, logits, logits, labels, **how) == pytest.approx(0, abs=1e-12)
    assert gradient(loss, logits, logits, labels, **how) == pytest.approx(0, abs=1e-12)


@few
@given(batches(), temperatures, st.randoms(use_true_random=False))
@every_soft_loss
def test_the_order_of_rows_and_of_classes_does_not_matter(loss, batch, temperature, random):
    student, teacher, labels = batch
    rows, classes = (random.sample(range(n), n) for n in student.shape)
    # Of two first choices the earlier class is taken, so unlabeled ties depend on the order.
    labels = np.where(labels == UNLABELED, teacher.argmax(axis=1), labels)
    expected = value(loss, student, teacher, labels, temperature=temperature)
    found = value(
        loss,
        student[rows][:, classes],
        teacher[rows][:, classes],
        np.argsort(classes)[labels[rows]],
        temperature=temperature,
    )
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@few
@given(batches(), st.randoms(use_true_random=False))
def test_nor_does_it_for_the_hard_loss(batch, random):
    student, _, labels = batch
    rows, classes = (random.sample(range(n), n) for n in student.shape)
    renamed = np.where(labels == UNLABELED, UNLABELED, np.argsort(classes)[labels])
    for smoothing in (0.0, 0.1):
        expected = value(hard_loss, student, labels, label_smoothing=smoothing)
        moved = value(
            hard_loss, student[rows][:, classes], renamed[rows], label_smoothing=smoothing
        )
        assert moved == pytest.approx(expected, rel=1e-6)
        assert expected >= 0


@few
@given(batches(), temperatures, st.integers(2, 4))
@pytest.mark.parametrize("name", ["kl", "dkd"])
def test_a_batch_said_twice_costs_the_same(name, batch, temperature, times):
    loss = SOFT[name]
    once = value(loss, *batch, temperature=temperature)
    again = (np.concatenate([part] * times) for part in batch)
    assert value(loss, *again, temperature=temperature) == pytest.approx(once, abs=1e-9)


@few
@given(st.integers(0, 99), st.floats(2.0, 8.0), st.integers(2, 4))
def test_nor_does_the_relational_loss_change(seed, temperature, times):
    """Short of columns so near to constant that what keeps the division finite is felt."""
    student, teacher, _ = random_batch(seed=seed)
    once = value(dist, student, teacher, temperature=temperature)
    again = (np.concatenate([part] * times) for part in (student, teacher))
    assert value(dist, *again, temperature=temperature) == pytest.approx(once)


@few
@given(batches(), st.integers(1, 3), st.integers(1, 3))
def test_every_position_of_a_map_counts_like_a_row(batch, height, width):
    student, teacher, labels = batch
    maps = [np.tile(part[..., None, None], (1,) * part.ndim + (height, width)) for part in batch]
    hard, soft = (
        value(hard_loss, student, labels),
        value(kl, student, teacher, temperature=2),
    )
    assert value(hard_loss, maps[0], maps[2]) == pytest.approx(hard)
    assert value(kl, maps[0], maps[1], temperature=2) == pytest.approx(soft)


@pytest.mark.parametrize("standardize", [False, True])
def test_maps_of_logits_are_rows_with_classes_in_the_second_place(standardize):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 2, 4, 3, 5))
    labels = random.integers(UNLABELED, 4, (2, 3, 5))
    rows = [np.moveaxis(part, 1, -1).reshape(-1, 4) for part in (student, teacher)]
    assert value(hard_loss, student, labels) == pytest.approx(
        value(hard_loss, rows[0], labels.ravel())
    )
    how = {"temperature": 2.0, "standardize": standardize}
    assert value(kl, student, teacher, **how) == pytest.approx(value(kl, *rows, **how))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_soft_loss
def test_low_precision_logits_are_computed_with_in_float32(loss, dtype):
    student, teacher, labels = (torch.tensor(part) for part in random_batch())
    student, teacher = student.to(dtype), teacher.to(dtype)
    for standardize in (False, True):
        how = {"temperature": 4.0, "standardize": standardize}
        expected = loss(student.double(), teacher.double(), labels, **how).item()
        own = student.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(own, teacher, labels, **how)
        found.backward()
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert torch.isfinite(own.grad).all()
        assert own.grad.abs().sum() > 0


def test_so_are_labels_and_features():
    logits, _, labels = (torch.tensor(part) for part in random_batch())
    low, weights = logits.bfloat16(), torch.tensor([0.5, 1.0, 2.0, 4.0, 0.25])
    features = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hard = hard_loss(low, labels, class_weights=weights)
        matched = feature_loss(*features)
    assert hard.dtype == matched.dtype == torch.float32
    expected = hard_loss(low.double(), labels, class_weights=weights.double()).item()
    assert hard.item() == pytest.approx(expected, rel=1e-5)
    expected = feature_loss(*(part.double() for part in features)).item()
    assert matched.item() == pytest.approx(expected, rel=1e-5)


# The temperature's way


def temperatures_of(epochs, **params):
    params = DistillParams(epochs=epochs, **params)
    return [temperature_at(epoch, params) for epoch in range(epochs)]


def test_a_temperature_decays_from_the_first_epoch_to_the_last():
    decayed = temperatures_of(4, temperature=8.0, temperature_end=2.0)
    assert decayed == pytest.approx([8.0, 6.0, 4.0, 2.0])
    assert temperatures_of(1, temperature=8.0, temperature_end=2.0) == [8.0]
    assert temperatures_of(3, temperature=8.0) == [8.0] * 3


@few
@given(temperatures, temperatures, st.integers(1, 50))
def test_it_never_leaves_its_two_ends(start, end, epochs):
    for temperature in temperatures_of(epochs, temperature=start, temperature_end=end):
        assert isinstance(temperature, float)
        assert min(start, end) - 1e-9 <= temperature <= max(start, end) + 1e-9
    assert set(temperatures_of(epochs, temperature=start, temperature_end=start)) == {start}
