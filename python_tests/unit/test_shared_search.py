"""What the search for shared parameters says it found, and what it finds odd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, Uniform


class Two(nn.Module):
    """An encoder and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.left = nn.Linear(4, 2)
        self.right = nn.Linear(4, 2)


X = torch.ones(5, 3)


def found(model: nn.Module, losses: Sequence[Tensor] | dict[str, Tensor]) -> str:
    balancer = Uniform(model, num_tasks=len(losses))
    balancer.backward(losses)
    head, _, text = str(balancer).partition("\n")
    assert head == repr(balancer)
    return text


def test_an_ordinary_model_is_told_of_in_three_lines():
    model = Two()
    z = model.encoder(X)
    assert found(model, {"l": model.left(z).sum(), "r": model.right(z).sum()}).splitlines() == [
        "Shared: encoder (2 parameters); 16 elements.",
        "Tasks part at: ReluBackward0 [5, 4].",
        "Heads: l left (2 parameters); r right (2 parameters).",
    ]


def test_before_the_first_step_the_text_says_what_is_missing():
    balancer = ExcessMTL(Two(), num_tasks=2)
    assert str(balancer).endswith("from the losses of the first step, or of prepare(losses).")
    assert str(ExcessMTL(num_tasks=2)) == repr(ExcessMTL(num_tasks=2))


def test_a_head_that_another_task_reads_is_odd():
    model = Two()
    z = model.encoder(X)
    out = model.left(z)
    text = found(model, [out.sum(), (model.right(z) * out).sum()])
    assert "Odd: left (2 parameters) is used after task 1 parted from the others" in text


def test_a_layer_that_every_task_takes_on_both_sides_is_not_odd():
    model = Two()
    model.neck = nn.Linear(4, 4)
    z = model.encoder(X)
    y = model.neck(z)
    text = found(
        model, [(model.left(z) + model.left(y)).sum(), (model.right(z) * model.right(y)).sum()]
    )
    assert "Odd" not in text
    assert text.startswith("Shared: encoder (2 parameters), neck (2 parameters); 36 elements.")


def test_a_layer_that_some_tasks_share_is_odd():
    model = Two()
    z = model.encoder(X)
    third = z.square().sum()
    text = found(model, [model.left(z).sum(), model.left(z).square().sum(), third])
    assert "Odd: left (2 parameters) is shared by tasks 0, 1 only." in text


def test_unused_and_frozen_parameters_are_named():
    model = Two()
    model.spare = nn.Linear(1, 1)
    model.encoder[0].bias.requires_grad_(False)
    z = model.encoder(X)
    text = found(model, [model.left(z).sum(), model.right(z).sum()])
    assert "Odd: spare (2 parameters) is reached by no loss." in text
    assert "Odd: encoder.0.bias is frozen, 4 elements, and has no state." in text


def test_adapters_of_a_frozen_base_are_what_is_shared():
    model = Two()
    model.encoder.requires_grad_(False)
    model.lora_a, model.lora_b = nn.Linear(3, 1, bias=False), nn.Linear(1, 4, bias=False)
    z = model.encoder(X) + model.lora_b(model.lora_a(X))
    text = found(model, [model.left(z).sum(), model.right(z).sum()])
    assert text.startswith("Shared: lora_a, lora_b; 7 elements.")
    assert "Odd: encoder (2 parameters) is frozen, 16 elements, and has no state." in text


def test_shared_parameters_outside_the_model_are_counted():
    model = Two()
    z = model.encoder(X)
    both = torch.ones(4, requires_grad=True)
    balancer = Uniform(model.encoder, num_tasks=2)
    balancer.backward([(model.left(z * both)).sum(), model.right(z * both).sum()])
    assert "1 parameters outside the model are reached by several tasks" in str(balancer)
    assert both.grad is not None


def test_many_heads_are_not_all_listed():
    encoder, heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 1) for _ in range(40)])
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})
    z = encoder(X)
    text = found(model, [head(z).sum() for head in heads])
    assert "task 5 heads.5 (2 parameters); ... (40 in all)" in text
    assert len(text) < 600


@pytest.mark.parametrize("compiles_whole", [True, False])
def test_a_model_compiled_as_one_is_refused_and_a_compiled_encoder_is_not(compiles_whole: bool):
    model = Two()

    def whole(x: Tensor) -> tuple[Tensor, Tensor]:
        z = model.encoder(x)
        return model.left(z).sum(), model.right(z).sum()

    balancer = Uniform(model, num_tasks=2)
    if compiles_whole:
        outputs: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(
            whole, backend="aot_eager"
        )
        with pytest.raises(ValueError, match=r"torch.compile has made one node of what several"):
            balancer.backward(outputs(X))
        balancer.prepare(whole(X))
        balancer.prepare(whole(X))
    else:
        z = torch.compile(model.encoder, backend="aot_eager")(X)
        balancer.backward([model.left(z).sum(), model.right(z).sum()])
    assert "Shared: encoder (2 parameters)" in str(balancer)
