"""Losses of domains: hand values, absent domains, one pass for all of them."""

from __future__ import annotations

import math

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, GroupDRO, Uniform
from excessmtl_ext.domains import domain_losses, move_weights, split_domains


def values(losses: list[Tensor | None]) -> list[float | None]:
    return [None if loss is None else loss.item() for loss in losses]


def test_losses_of_samples_are_averaged_by_domain():
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert values(domain_losses(losses, torch.tensor([1, 0, 1, 3]), 4)) == [2.0, 2.5, None, 8.0]


def test_losses_of_tokens_take_the_domain_of_their_sample_or_their_own():
    losses = torch.tensor([[1.0, 3.0], [5.0, 10.0]])
    assert values(domain_losses(losses, torch.tensor([0, 1]), 2)) == [2.0, 7.5]
    assert values(domain_losses(losses, torch.tensor([[0, 1], [1, 1]]), 2)) == [1.0, 6.0]


def test_masked_tokens_and_those_of_no_domain_do_not_count():
    losses = torch.tensor([[1.0, 3.0], [5.0, math.nan]])
    mask = torch.tensor([[True, False], [True, False]])
    assert values(domain_losses(losses, torch.tensor([0, 1]), 2, mask=mask)) == [1.0, 5.0]
    assert values(domain_losses(losses, torch.tensor([0, -1]), 2)) == [2.0, None]
    no_row = torch.tensor([True, False])
    assert values(domain_losses(losses, torch.tensor([0, 1]), 2, mask=no_row)) == [2.0, None]


def test_gradients_are_those_of_means_over_the_domain_alone():
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    first, second = domain_losses(losses, torch.tensor([0, 1, 0]), 2)
    assert first is not None
    assert second is not None
    assert torch.autograd.grad(first, losses, retain_graph=True)[0].tolist() == [0.5, 0.0, 0.5]
    assert torch.autograd.grad(second, losses)[0].tolist() == [0.0, 1.0, 0.0]


def test_a_nan_stays_in_its_domain():
    losses = torch.tensor([math.nan, 2.0])
    found = values(domain_losses(losses, torch.tensor([0, 1]), 2))
    assert math.isnan(found[0])  # type: ignore[arg-type]
    assert found[1] == 2.0


def test_half_precision_is_averaged_in_float32():
    losses = torch.full((4096,), 1.0, dtype=torch.float16)
    losses[0] = 60000.0
    (mean,) = domain_losses(losses, torch.zeros(4096, dtype=torch.int64), 1)
    assert mean is not None
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx((60000 - 1) / 4096 + 1, rel=1e-3)


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), None, TypeError, "`domain_ids` to be integers, but got"),
        (torch.tensor([True, True]), None, TypeError, "`domain_ids` to be integers, but got"),
        (
            torch.tensor([0, 1, 1]),
            None,
            ValueError,
            r"`domain_ids` of the shape of `losses`, \[2\]",
        ),
        (torch.tensor([0, 2]), None, ValueError, "below num_domains = 2, but got 2"),
        (torch.tensor([0, 1]), torch.tensor([1, 0]), TypeError, "`mask` to be boolean"),
        (torch.tensor([0, 1]), torch.tensor([True]), ValueError, "`mask` of the shape of"),
    ],
)
def test_wrong_arguments_raise(ids: Tensor, mask: Tensor | None, error: type, message: str):
    with pytest.raises(error, match=message):
        domain_losses(torch.ones(2), ids, 2, mask=mask)


def test_a_reduced_loss_is_told():
    with pytest.raises(ValueError, match="reduction='none'"):
        domain_losses(torch.tensor(1.0), torch.tensor([0]), 1)


# ---- one pass


def make_model() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 3)


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(3, (12,), generator=generator)
    if number == 2:
        ids[ids == 1] = 0
    return (
        torch.randn(12, 5, generator=generator),
        torch.randint(3, (12,), generator=generator),
        ids,
    )


def test_split_domains_takes_the_steps_of_features_with_a_pass_per_domain():
    """The same weights and gradients as backward(losses, features=z), where each domain's loss is given by itself."""
    models = make_model(), make_model()
    balancers = ExcessMTL(num_tasks=3), None
    backbone, head = models[1]
    balancers = (
        ExcessMTL(num_tasks=3),
        ExcessMTL(backbone.parameters(), num_tasks=3, estimate_from="features"),
    )
    for number in range(4):
        x, y, ids = batch(number)
        for index, ((backbone, head), balancer) in enumerate(zip(models, balancers, strict=True)):
            backbone.zero_grad()
            head.zero_grad()
            z = backbone(x)
            inputs = split_domains(balancer, z, ids) if index == 0 else z
            per_sample = nn.functional.cross_entropy(head(inputs), y, reduction="none")
            losses = domain_losses(per_sample, ids, 3)
            if index == 0:
                sum(loss for loss in losses if loss is not None).backward()  # type: ignore[union-attr]
            else:
                balancer.backward(losses, features=z)
        for one, other in zip(
            *([*b.parameters(), *h.parameters()] for b, h in models), strict=True
        ):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(balancers[0].task_weights, balancers[1].task_weights)
    assert balancers[0].num_task_steps.tolist() == [4, 3, 4]


def test_tokens_of_one_sequence_may_be_of_several_domains():
    balancer = ExcessMTL(num_tasks=2, feature_dim=-1)
    base = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]])
    z = split_domains(balancer, base * 1, ids)
    assert_equal_bits([z], [base])
    losses = domain_losses(z.square().sum(-1), ids, 2)
    sum(losses).backward()  # type: ignore[union-attr, arg-type]
    assert base.grad is not None
    assert base.grad[0, 2].tolist() == [0.0] * 4
    assert balancer.num_task_steps.tolist() == [1, 1]


def test_split_domains_leaves_evaluation_alone():
    balancer = ExcessMTL(num_tasks=2)
    z = torch.ones(2, 3)
    with torch.no_grad():
        assert torch.equal(split_domains(balancer, z, torch.tensor([0, 1])), z)
    assert balancer.num_calls == 0
    with pytest.raises(ValueError, match=r"Expected `domain_ids` of shape \[2\], one per sample"):
        split_domains(balancer, z, torch.tensor([0, 1, 1]))


# ---- weights alone


@pytest.mark.parametrize("kind", ["exact", "subset", "found", "GroupDRO"])
def test_move_weights_moves_them_as_backward_does_and_writes_no_gradient(kind: str):
    models = make_model(), make_model()

    def make(backbone: nn.Module, head: nn.Module) -> ExcessMTL | GroupDRO:
        everything = [*backbone.parameters(), *head.parameters()]
        if kind == "GroupDRO":
            return GroupDRO(everything, num_tasks=3, robust_step_size=1.0)
        if kind == "found":
            return ExcessMTL(nn.ModuleList([backbone, head]), num_tasks=3)
        options = {"estimate_from": head.parameters()} if kind == "subset" else {}
        return ExcessMTL(everything, num_tasks=3, **options)

    balancers = [make(*model) for model in models]
    for number in range(4):
        x, y, ids = batch(number)
        for index, ((backbone, head), balancer) in enumerate(zip(models, balancers, strict=True)):
            backbone.zero_grad()
            head.zero_grad()
            per_sample = nn.functional.cross_entropy(head(backbone(x)), y, reduction="none")
            losses = domain_losses(per_sample, ids, 3)
            if index == 0:
                assert torch.equal(move_weights(balancer, losses), balancer.task_weights)
                assert all(p.grad is None for p in [*backbone.parameters(), *head.parameters()])
                per_sample.mean().backward()  # the graph is there
            else:
                balancer.backward(losses)
        assert_equal_bits(*([each.task_weights] for each in balancers))
    assert balancers[0].task_weights.std() > 0
    assert balancers[0].num_calls == 4


def test_move_weights_refuses_what_it_cannot_see():
    balancer = ExcessMTL([nn.Parameter(torch.ones(2))], num_tasks=2, estimate_from="features")
    with pytest.raises(NotImplementedError, match=r"risks from parameters, for move_weights\(\)"):
        move_weights(balancer, [None, None])
    uniform = Uniform([nn.Parameter(torch.ones(2))], num_tasks=2)
    assert move_weights(uniform, [None, None]).tolist() == [0.5, 0.5]
