"""Two towers: user heads see the user alone, padding and the order of the history do not matter."""

from __future__ import annotations

import torch

from excessmtl_ext.models import two_towers


def test_user_heads_do_not_see_the_item() -> None:
    model = two_towers(40, [1, 3], user_tasks={1}, width=8).eval()
    first, other = torch.tensor([[30, 1, 2]]), torch.tensor([[31, 1, 2]])
    (rating, sex), (other_rating, other_sex) = model(first), model(other)
    assert tuple(rating.shape) == (1, 1)
    assert tuple(sex.shape) == (1, 3)
    assert not torch.equal(rating, other_rating)
    torch.testing.assert_close(sex, other_sex, rtol=0, atol=0)


def test_features_are_user_item_and_product() -> None:
    model = two_towers(40, [1], width=8).eval()
    features = model.features(torch.tensor([[30, 1, 2, 0]]))
    user, item, product = features.split(8, dim=1)
    torch.testing.assert_close(product, user * item)


def test_padding_order_and_type_of_tokens_change_nothing() -> None:
    model = two_towers(40, [1], width=8).eval()
    expected = model(torch.tensor([[30, 1, 2]]))[0]
    for row in ([30, 2, 1], [30, 1, 2, 0, 0]):
        torch.testing.assert_close(model(torch.tensor([row]))[0], expected)
    torch.testing.assert_close(model(torch.tensor([[30.0, 1.0, 2.0]]))[0], expected)


def test_a_user_without_a_history_has_finite_outputs_and_padding_no_gradient() -> None:
    model = two_towers(40, [1, 2], user_tasks=[1], width=8)
    outputs = model(torch.tensor([[30, 0, 0], [31, 1, 0]]))
    sum(output.sum() for output in outputs).backward()
    assert all(output.isfinite().all() for output in outputs)
    assert not model.encoder.history.weight.grad[0].any()
    assert model.encoder.item.weight.grad[30].any()
