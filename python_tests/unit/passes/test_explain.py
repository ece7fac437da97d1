"""What autograd says of a freed or compiled graph is said again in terms of the balancer's arguments."""

from __future__ import annotations

import pytest
import torch

from excessmtl_ext.passes.explain import raise_explained
from excessmtl_ext.passes.per_task import run_backward


def test_a_freed_graph_is_explained() -> None:
    loss = torch.ones(2, requires_grad=True).exp().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"retain_graph=True: balancer.backward") as caught:
        run_backward([loss], [torch.ones(())], retain_graph=False)
    assert "a second time" in str(caught.value.__cause__)


def test_donated_buffers_are_explained_and_other_errors_are_not_touched() -> None:
    with pytest.raises(RuntimeError, match=r"torch.compile has compiled one for a single pass"):
        raise_explained(RuntimeError("this uses donated buffers"))
    raise_explained(RuntimeError("something else"))
