"""Shared parameters that a balancer finds in a model: the same steps as with those given, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn

from excessmtl_ext import (
    IMTL,
    MGDA,
    Balancer,
    ExcessMTL,
    GradNorm,
    GroupDRO,
    SingleTask,
    TaskSplit,
    Uniform,
)


class Net(nn.Module):
    """Heads are registered before the encoder, so that order tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(3)])
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())

    def losses(self, x: Tensor) -> list[Tensor]:
        return self.losses_of([self.encoder(x)] * 3)

    def losses_of(self, features: Any) -> list[Tensor]:
        return [head(z).square().mean() for head, z in zip(self.heads, features, strict=True)]


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(number: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(number))


def plain(balancer: Balancer, net: Net, x: Tensor) -> None:
    balancer.backward(net.losses(x))


def with_features(balancer: Balancer, net: Net, x: Tensor) -> None:
    z = net.encoder(x)
    balancer.backward(net.losses_of([z] * 3), features=z)


def scalar(balancer: Balancer, net: Net, x: Tensor) -> None:
    balancer(net.losses(x)).backward()


def streamed(balancer: Balancer, net: Net, x: Tensor) -> None:
    if balancer.awaits_losses:
        balancer.prepare(net.losses(x))
    for task in range(3):
        balancer.accumulate(task, net.losses(x)[task])
    balancer.finish()


def last_layer(net: Net) -> dict[str, Any]:
    return {"estimate_from": net.encoder[2].parameters()}


MODES: dict[
    str, tuple[Callable[..., Any], Callable[[Net], dict[str, Any]], Callable[..., None]]
] = {
    "exact": (ExcessMTL, lambda net: {}, plain),
    "official": (ExcessMTL, lambda net: {"robust_step_size": 0.01, "combine": "sum"}, plain),
    "scalar": (ExcessMTL, lambda net: {}, scalar),
    "batched": (ExcessMTL, lambda net: {"batched": True}, with_features),
    "features": (ExcessMTL, lambda net: {"estimate_from": "features"}, with_features),
    "subset": (ExcessMTL, last_layer, plain),
    "rotation": (ExcessMTL, lambda net: {"tasks_per_step": 1}, plain),
    "rotated subset": (ExcessMTL, lambda net: {**last_layer(net), "tasks_per_step": 2}, plain),
    "every other": (ExcessMTL, lambda net: {"update_every": 2}, plain),
    "streaming": (ExcessMTL, lambda net: {}, streamed),
    "bfloat16": (ExcessMTL, lambda net: {"state_dtype": torch.bfloat16}, plain),
    "Uniform": (Uniform, lambda net: {}, plain),
    "GroupDRO": (GroupDRO, lambda net: {}, plain),
    "GradNorm": (GradNorm, lambda net: {}, plain),
    "MGDA": (MGDA, lambda net: {}, plain),
    "IMTL": (IMTL, lambda net: {}, plain),
    "SingleTask": (SingleTask, lambda net: {"task": 1}, plain),
}


def grads_of(net: Net) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("mode", MODES)
def test_steps_are_those_of_a_balancer_that_was_given_the_encoder(mode: str):
    kind, options, step = MODES[mode]
    nets = make_net(), make_net()
    balancers = [
        kind(given, num_tasks=3, **options(net))
        for given, net in zip((nets[0], nets[1].encoder.parameters()), nets, strict=True)
    ]
    for number in range(4):
        for net, balancer in zip(nets, balancers, strict=True):
            net.zero_grad()
            step(balancer, net, batch(number))
        assert_equal_bits(*map(grads_of, nets))
    first, second = (balancer.state_tensors() for balancer in balancers)
    assert first.keys() == second.keys()
    assert_equal_bits(list(first.values()), list(second.values()))
    assert [each.shape for each in balancers[0].shared_parameters or ()] == [
        each.shape for each in nets[0].encoder.parameters()
    ]


def test_split_needs_no_shared_parameters():
    torch.manual_seed(0)
    net = make_net()
    other = copy.deepcopy(net)
    balancers = ExcessMTL(net, num_tasks=3), ExcessMTL(num_tasks=3)
    for model, balancer in zip((net, other), balancers, strict=True):
        z = model.encoder(batch(0))
        sum(model.losses_of(TaskSplit(balancer)(z))).backward()  # type: ignore[arg-type]
    assert_equal_bits(grads_of(net), grads_of(other))
    assert len(grads_of(net)) == 10
    assert balancers[0].awaits_losses


# ---- prepare


def test_prepare_gives_the_state_its_final_shape_and_changes_nothing_else():
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3)
    assert balancer.sq_grad_sum.shape == (3, 0)
    balancer.prepare(net.losses(batch(0)))
    shapes = {name: each.shape for name, each in balancer.state_tensors().items()}
    assert balancer.sq_grad_sum.count_nonzero() == 0
    assert balancer.num_calls == 0
    assert all(parameter.grad is None for parameter in net.parameters())
    plain(balancer, net, batch(1))
    assert {name: each.shape for name, each in balancer.state_tensors().items()} == shapes


def test_prepare_with_features_sizes_the_state_of_their_adapters():
    net = make_net()
    for balancer in (
        ExcessMTL(net, num_tasks=3, estimate_from="features"),
        ExcessMTL(num_tasks=3),
        ExcessMTL(net.encoder.parameters(), num_tasks=3, estimate_from="features"),
    ):
        z = net.encoder(batch(0))
        balancer.prepare(net.losses_of([z] * 3), features=z)
        shapes = {name: each.shape for name, each in balancer.state_tensors().items()}
        assert shapes["sq_grad_sum"] == (3, 64)  # 6 * 6, padded
        z = net.encoder(batch(0))
        sum(net.losses_of(balancer.split(z))).backward()  # type: ignore[arg-type]
        assert {name: each.shape for name, each in balancer.state_tensors().items()} == shapes
        with pytest.raises(ValueError, match="as in the first step"):
            balancer.prepare(features=net.encoder[0](batch(0)))


def test_prepare_needs_something():
    with pytest.raises(ValueError, match="Expected `losses` or `features`, but got neither"):
        ExcessMTL(make_net(), num_tasks=3).prepare()


@pytest.mark.parametrize("loads_first", [True, False])
def test_a_run_continues_from_a_checkpoint_whether_or_not_the_parameters_were_found(
    loads_first: bool,
):
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3)
    for number in range(3):
        plain(balancer, net, batch(number))
    resumed = ExcessMTL(net, num_tasks=3)
    if not loads_first:
        resumed.prepare(net.losses(batch(0)))
    resumed.load_state_dict(copy.deepcopy(balancer.state_dict()))
    for each in (balancer, resumed):
        net.zero_grad()
        plain(each, net, batch(3))
        each.kept = grads_of(net)  # type: ignore[attr-defined]
    assert_equal_bits(balancer.kept, resumed.kept)  # type: ignore[attr-defined]
    assert_equal_bits(*(list(each.state_tensors().values()) for each in (balancer, resumed)))


def test_a_state_of_another_model_is_refused_when_the_parameters_are_found():
    net, wide = make_net(), make_net()
    wide.encoder[0] = nn.Linear(5, 9)
    wide.encoder[2] = nn.Linear(9, 6)
    saved = ExcessMTL(wide, num_tasks=3)
    plain(saved, wide, batch(0))
    balancer = ExcessMTL(net, num_tasks=3)
    balancer.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"those of the state, with the sizes \[45, 9, 54, 6\]"):
        plain(balancer, net, batch(0))
    assert all(parameter.grad is None for parameter in net.parameters())
    balancer.reset()
    plain(balancer, net, batch(0))


def test_a_state_saved_before_the_parameters_were_found_is_a_fresh_one():
    net = make_net()
    fresh = ExcessMTL(net, num_tasks=3).state_dict()
    balancer = ExcessMTL(net, num_tasks=3)
    balancer.prepare(net.losses(batch(0)))
    balancer.load_state_dict(fresh)
    plain(balancer, net, batch(0))
    assert balancer.sq_grad_sum.shape == (3, 192)


def test_a_copy_finds_its_own_parameters():
    net = make_net()
    pair = copy.deepcopy(nn.ModuleDict({"net": net, "balancer": ExcessMTL(net, num_tasks=3)}))
    twin: Any = pair["net"]
    balancer: Any = pair["balancer"]
    plain(balancer, twin, batch(0))
    assert balancer.shared_parameters[0] is twin.encoder[0].weight
    assert not [name for name in balancer.state_dict() if "encoder" in name]
    assert list(balancer.parameters()) == []


# ---- tasks without losses


def test_an_absent_task_that_leaves_it_open_is_an_error_that_costs_nothing():
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3)
    losses = net.losses(batch(0))
    with pytest.raises(ValueError, match=r"task\(s\) 2 had none so far, so that heads.0 "):
        balancer.backward([losses[0], losses[1], None])
    assert balancer.awaits_losses
    assert "losses of tasks 0, 1" in str(balancer)
    plain(balancer, net, batch(1))
    assert len(balancer.shared_parameters or ()) == 4


def test_tasks_with_batches_of_their_own_are_prepared_one_by_one():
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3)
    for task in range(3):
        assert balancer.awaits_losses
        losses: list[Tensor | None] = [None] * 3
        losses[task] = net.losses(batch(task))[task]
        balancer.prepare(losses)
    assert len(balancer.shared_parameters or ()) == 4
    balancer.backward([net.losses(batch(0))[0], None, None])
    assert "Tasks part at: the parameters" in str(balancer)


def test_absent_tasks_leave_nothing_open_where_every_parameter_is_shared_already():
    net = make_net()
    balancer = ExcessMTL(net.encoder, num_tasks=3)
    losses = net.losses(batch(0))
    balancer.backward([losses[0], losses[1], None])
    assert len(balancer.shared_parameters or ()) == 4


def test_of_a_single_task_everything_is_shared():
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=1)
    balancer.backward([net.losses(batch(0))[0]])
    assert len(balancer.shared_parameters or ()) == 6


# ---- errors


@pytest.mark.parametrize("verb", ["accumulate", "update_weights"])
def test_verbs_that_see_no_graph_of_all_tasks_need_prepare(verb: str):
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3)
    loss = net.losses(batch(0))[0]
    with pytest.raises(ValueError, match=rf"Expected prepare\(losses\) before {verb}\(\)"):
        if verb == "accumulate":
            balancer.accumulate(0, loss)
        else:
            balancer.update_weights([[torch.ones(3)]] * 3)


def test_losses_that_share_nothing_are_an_error():
    heads = nn.ModuleList([nn.Linear(2, 1) for _ in range(2)])
    balancer = ExcessMTL(heads, num_tasks=2)
    with pytest.raises(ValueError, match="each of the 4 that a loss reaches is reached by that of"):
        balancer.backward([head(torch.ones(1, 2)).sum() for head in heads])
    other = ExcessMTL(nn.Linear(2, 1), num_tasks=2)
    with pytest.raises(ValueError, match="the losses reach none of its parameters"):
        other.backward([head(torch.ones(1, 2)).sum() for head in heads])


def test_a_subset_must_be_among_the_parameters_found():
    net = make_net()
    balancer = ExcessMTL(net, num_tasks=3, estimate_from=net.heads[0].parameters())
    with pytest.raises(ValueError, match=r"Expected `estimate_from\[0\]` to be one of the shared"):
        plain(balancer, net, batch(0))
    assert balancer.awaits_losses


def test_a_frozen_model_is_refused_when_the_balancer_is_made():
    with pytest.raises(ValueError, match="all 2 are frozen"):
        Uniform(nn.Linear(2, 2).requires_grad_(False), num_tasks=2)


def test_a_thawed_parameter_is_an_error_only_where_it_is_shared():
    net = make_net()
    net.encoder[0].requires_grad_(False)
    net.heads[0].requires_grad_(False)
    balancer = ExcessMTL(net, num_tasks=3)
    plain(balancer, net, batch(0))
    net.heads[0].requires_grad_(True)
    plain(balancer, net, batch(1))
    net.encoder[0].requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"Expected `encoder.0.weight`, of shape \[8, 5\], to stay"
    ):
        plain(balancer, net, batch(2))


def test_a_parameter_that_tasks_reach_later_is_told_of_once():
    net = make_net()
    net.extra = nn.Linear(6, 6)  # type: ignore[assignment]
    balancer = Uniform(net, num_tasks=3)
    plain(balancer, net, batch(0))

    def later() -> None:
        net.zero_grad()
        balancer.backward(net.losses_of([net.extra(net.encoder(batch(1)))] * 3))  # type: ignore[operator]

    with pytest.warns(UserWarning, match=r"No loss reached extra \(2 parameters\) when"):
        later()
    later()
