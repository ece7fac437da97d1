"""The report names the task whose labels are wrong, the one that is left behind, and says what it does not know."""

from __future__ import annotations

import pytest
import torch
from _published import published
from torch import Tensor, nn

from excessmtl_ext import Balancer, ExcessMTL, Uniform
from excessmtl_ext.report import NOT_RECORDED, BalancerReport


def report_of(gradients: Tensor, **options: object) -> BalancerReport:
    """The report on [N, T, P] gradients."""
    balancer = published(num_tasks=gradients.shape[1], **options)  # type: ignore[arg-type]
    with balancer.record_history(gradients=True, task_names=["clean", "other"]):
        for step in gradients:
            balancer.update_weights(step)
    return balancer.report()


def shrinking(num_steps: int, num_params: int) -> Tensor:
    """A task that nears its optimum: [N, P], from 1 to 0.2 in length, with as much noise as signal."""
    length = torch.linspace(1.0, 0.2, num_steps)[:, None]
    return length * (1 + torch.randn(num_steps, num_params))


def test_the_table_shows_the_numbers_and_the_data_hold_them() -> None:
    gradients = torch.ones(30, 2, 4)
    gradients[:, 1] *= 3
    report = report_of(gradients)
    first, second = report.tasks
    assert (first.gradient_norm, second.gradient_norm) == pytest.approx((2.0, 6.0))
    assert (first.noise_share, first.cosine) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert first.weight + second.weight == pytest.approx(1.0)
    assert first.relative_risk == pytest.approx(first.excess_risk / first.baseline)  # type: ignore[operator]
    assert (first.skipped_steps, first.absent_steps) == (0, 0)
    lines = str(report).splitlines()
    assert lines[0] == "ExcessMTL after 30 steps, 0 skipped"
    assert "relative risk" in lines[2]
    assert "gradient norm" in lines[2]
    assert lines[4].split()[:1] == ["other"]
    assert lines[4].split()[5] == "6"
    assert lines[-1] == report.finding


def test_without_a_history_the_gradients_are_not_recorded() -> None:
    balancer = published(num_tasks=2)
    balancer.update_weights([[torch.ones(3)], [torch.ones(3)]])
    report = balancer.report()
    assert [task.name for task in report.tasks] == ["task0", "task1"]
    assert report.tasks[0].weight == pytest.approx(0.5)
    assert report.tasks[0].relative_risk == pytest.approx(1.0)
    assert report.tasks[0].gradient_norm is None
    assert str(report).splitlines()[3].count(NOT_RECORDED) == 4
    assert "record_history(gradients=True)" in report.finding


def test_a_method_without_risks_and_gradients_says_so() -> None:
    encoder = nn.Linear(2, 2)
    balancer: Balancer = Uniform(encoder.parameters(), num_tasks=2)
    with balancer.record_history(gradients=True):
        for _ in range(30):
            balancer.backward([encoder(torch.ones(2)).sum(), None])
    report = balancer.report()
    assert report.tasks[0].excess_risk is None
    assert report.tasks[1].absent_steps == 30
    assert "Uniform never sees the gradient of one task alone" in report.finding


def test_absent_and_skipped_steps_are_counted_by_task() -> None:
    balancer = published(num_tasks=2)
    balancer.record_history(gradients=True)
    one, bad = torch.ones(3), torch.full((3,), float("nan"))
    for grads in ([[one], [one]], [[one], []], [[one], []], [[one], [bad]]):
        balancer.update_weights(grads)
    report = balancer.report()
    assert [task.skipped_steps for task in report.tasks] == [0, 1]
    assert [task.absent_steps for task in report.tasks] == [0, 2]
    assert report.num_skipped_steps == 1
    assert report.finding.startswith("task1 had gradients that were not finite in 1 step")


def test_too_few_records_are_no_evidence() -> None:
    finding = report_of(torch.randn(10, 2, 50)).finding
    assert finding.startswith("Too early to say")
    assert "10 of at least 20 records" in finding


def test_a_task_whose_gradients_cancel_and_do_not_shrink_looks_noisy() -> None:
    gradients = torch.stack([shrinking(300, 200), torch.randn(300, 200)], dim=1)
    report = report_of(gradients)
    assert report.finding.startswith("other looks noisy: ")
    assert "clean looks" not in report.finding
    assert f"weight {report.tasks[1].weight:.3g}" in report.finding


def test_a_task_that_the_combined_gradient_ignores_looks_stuck() -> None:
    # The second task's gradient is opposite to the first's and a tenth as long.
    gradients = torch.stack([torch.ones(50, 20), torch.full((50, 20), -0.1)], dim=1)
    report = report_of(gradients)
    assert report.finding.startswith("other looks stuck: ")
    assert "cosine -1.00" in report.finding
    assert "clean looks" not in report.finding


def test_tasks_that_near_their_optimum_are_not_accused() -> None:
    gradients = torch.stack([shrinking(300, 200), shrinking(300, 200)], dim=1)
    assert report_of(gradients).finding.startswith("No task looks noisy or stuck.")


def test_wrong_labels_of_a_regression_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 8, generator=generator)
    targets = torch.stack([inputs[:, 0].sin(), inputs[:, 1].tanh()], dim=1)
    targets[:, 1] = torch.where(
        torch.rand(400, generator=generator) < 0.8,
        targets[torch.randperm(400, generator=generator), 1],
        targets[:, 1],
    )
    encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
    heads = nn.ModuleList([nn.Linear(32, 1), nn.Linear(32, 1)])
    balancer = ExcessMTL.from_preset("recommended", encoder.parameters(), num_tasks=2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *heads.parameters()], lr=5e-3)
    with balancer.record_history(gradients=True, task_names=["sine", "shuffled"]):
        for _ in range(400):
            batch = torch.randint(400, (40,), generator=generator)
            features = encoder(inputs[batch])
            optimizer.zero_grad()
            balancer.backward(
                [
                    ((head(features)[:, 0] - targets[batch, i]) ** 2).mean()
                    for i, head in enumerate(heads)
                ]
            )
            optimizer.step()
    finding = balancer.report().finding
    assert finding.startswith("shuffled looks noisy: ")
    assert "sine looks" not in finding
