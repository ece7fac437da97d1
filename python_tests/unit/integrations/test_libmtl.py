"""The LibMTL adapter inside LibMTL's own Trainer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from _published import PUBLISHED, published
from torch import nn
from torch.utils.data import DataLoader

from excessmtl_ext import MGDA, Balancer, ExcessMTL, GroupDRO

pytest.importorskip(
    "LibMTL", reason="LibMTL is not installed (from GitHub: PyPI's 1.1.5 is too old to import)"
)

import LibMTL
from integrations._libmtl_trainer import Trainer, settings

from excessmtl_ext.integrations import libmtl

TASKS = ["small", "large"]


def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 6, generator=generator)
    targets = torch.randn(24, 2, generator=generator) * torch.tensor([1.0, 4.0])
    rows = [
        (x, {task: y[i : i + 1] for i, task in enumerate(TASKS)})
        for x, y in zip(inputs, targets, strict=True)
    ]
    return DataLoader(rows, batch_size=8)


def make_trainer(weighting: str, multi_input: bool = False, **options) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        weighting=weighting,
        **{**settings(TASKS), "multi_input": multi_input, "weight_args": {}, **options},
    )


def train(trainer: Trainer, epochs: int) -> torch.Tensor:
    """Trains as LibMTL's users do; the weights of every step [T, epochs * batches]."""
    data = batches()
    if trainer.multi_input:
        rows = list(data.dataset)
        data = {task: DataLoader([(x, y[task]) for x, y in rows], batch_size=8) for task in TASKS}
    trainer.train(data, data, epochs)
    return torch.from_numpy(trainer.batch_weight).flatten(1)


def own_loop(make_balancer, epochs: int) -> tuple[nn.Module, Balancer]:
    """The same training without LibMTL, from the parameters that its Trainer starts with."""
    start = make_trainer("EW").model
    balancer = make_balancer(start.encoder.parameters(), num_tasks=2)
    optimizer = torch.optim.SGD(start.parameters(), lr=0.05)
    for _ in range(epochs):
        for x, y in batches():
            outputs = start(x.to(start.device))
            losses = [(outputs[task] - y[task].to(start.device)).square().mean() for task in TASKS]
            optimizer.zero_grad()
            balancer.backward(losses)
            optimizer.step()
    return start, balancer


@pytest.mark.parametrize("multi_input", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        partial(ExcessMTL, **{**PUBLISHED, "robust_step_size": 0.5}),
        partial(ExcessMTL.from_preset, "official"),
        partial(GroupDRO, robust_step_size=0.1),
        MGDA,
    ],
    ids=["ExcessMTL", "official", "GroupDRO", "MGDA"],
)
def test_the_trainer_trains_as_a_loop_of_ones_own(method, multi_input):
    trainer = make_trainer(libmtl.weighting(method), multi_input)
    weights = train(trainer, 3)
    model, balancer = own_loop(method, 3)
    torch.testing.assert_close(weights[:, -1], balancer.task_weights.cpu(), rtol=1e-5, atol=1e-8)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter)
    assert weights.shape == (2, 9)
    assert weights[:, 0].std() < weights[:, -1].std()


@pytest.mark.skipif(
    not hasattr(LibMTL.weighting, "ExcessMTL"), reason="this LibMTL has no ExcessMTL of its own"
)
def test_the_official_preset_repeats_libmtls_own_excessmtl():
    theirs = make_trainer("ExcessMTL", weight_args={"robust_step_size": 0.5})
    ours = make_trainer(
        libmtl.weighting(partial(ExcessMTL.from_preset, "official", robust_step_size=0.5))
    )
    torch.testing.assert_close(train(ours, 4), train(theirs, 4), rtol=1e-4, atol=1e-5)
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_what_the_trainer_saves_continues_bit_for_bit(tmp_path):
    name = libmtl.weighting(partial(ExcessMTL, **{**PUBLISHED, "robust_step_size": 0.5}))
    whole = make_trainer(name)
    train(whole, 2)
    torch.save(whole.model.state_dict(), tmp_path / "best.pt")  # as the Trainer with save_path
    expected = train(whole, 2)
    resumed = make_trainer(name, load_path=str(tmp_path))
    assert torch.equal(train(resumed, 2), expected)
    assert expected[0, 0] != expected[1, 0]


def test_repeated_weight_args_are_accepted_and_contradicting_ones_refused():
    name = libmtl.weighting(partial(ExcessMTL, **{**PUBLISHED, "robust_step_size": 0.5}))
    train(make_trainer(name, weight_args={"robust_step_size": 0.5}), 1)
    with pytest.raises(ValueError, match=r"robust_step_size=0\.1.*Give options to the balancer"):
        train(make_trainer(name, weight_args={"robust_step_size": 0.1}), 1)
    with pytest.raises(ValueError, match="unknown=1"):
        train(make_trainer(name, weight_args={"unknown": 1}), 1)


def test_representation_gradients_are_refused():
    with pytest.raises(ValueError, match="Expected `rep_grad=False`"):
        make_trainer(libmtl.weighting(ExcessMTL), rep_grad=True)


def test_a_finished_balancer_is_refused():
    with pytest.raises(TypeError, match="Pass the class"):
        libmtl.weighting(published(num_tasks=2))  # type: ignore[arg-type]


def test_every_registration_has_a_name_of_its_own():
    assert libmtl.weighting(ExcessMTL) != libmtl.weighting(MGDA)
