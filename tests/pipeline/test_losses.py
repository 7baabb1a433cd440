import numpy as np
import pytest
import torch

from pipeline.losses import hard_loss, soft_loss


def log_softmax(logits):
    """In float64 numpy, by its definition."""
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def reference_soft(student, teacher, temperature):
    """KL(teacher || student) at a temperature, times T^2, in float64 numpy."""
    log_p, log_q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_the_soft_loss_is_hintons(temperature):
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 3, (2, 11, 5))
    found = soft_loss(torch.tensor(student), torch.tensor(teacher), temperature=temperature)
    assert found.item() == pytest.approx(reference_soft(student, teacher, temperature), rel=1e-9)


def test_it_is_the_divergence_from_the_teacher_and_not_the_other_way():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    forward = soft_loss(student, teacher, temperature=1.0).item()
    p = 1 / (1 + np.exp(-4.0))
    assert forward == pytest.approx(p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p)), rel=1e-5)
    assert forward != pytest.approx(soft_loss(teacher, student, temperature=1.0).item(), rel=0.05)


def test_no_gradient_flows_into_the_teacher():
    student = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.randn(2, 3, requires_grad=True)
    soft_loss(student, teacher, temperature=2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_gradients_keep_their_size_at_any_temperature():
    torch.manual_seed(0)
    logits, teacher = 0.1 * torch.randn(64, 5), 0.1 * torch.randn(64, 5)
    norms = []
    for temperature in (2.0, 4.0, 8.0):
        student = logits.clone().requires_grad_()
        soft_loss(student, teacher, temperature=temperature).backward()
        norms.append(student.grad.norm().item())
    assert max(norms) / min(norms) < 1.2


def test_the_hard_loss_is_the_mean_negative_log_likelihood():
    logits = np.random.default_rng(1).normal(size=(6, 4))
    labels = np.array([0, 1, 2, 3, 3, 0])
    expected = -log_softmax(logits)[np.arange(6), labels].mean()
    found = hard_loss(torch.tensor(logits), torch.tensor(labels))
    assert found.item() == pytest.approx(expected)
