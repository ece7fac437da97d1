"""The bytes that are counted, against those that torch's allocator and the process really had."""

from __future__ import annotations

import pytest
import torch
from _published import published
from torch import nn

from excessmtl_ext import ExcessMTL, GroupDRO, memory
from excessmtl_ext.balancer import Balancer

NUM_TASKS = 6
WIDTH = 512
P = WIDTH * WIDTH


class Net(nn.Module):
    """One square layer and a head per task: gradients and state outweigh everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH, bias=False)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(NUM_TASKS)])

    def losses(self) -> list[torch.Tensor]:
        features = self.encoder(torch.ones(1, WIDTH))
        return [head(features).square().sum() for head in self.heads]


def step_of(balancer: Balancer, net: Net, *, streaming: bool = False):
    def step() -> None:
        net.zero_grad()
        losses = net.losses()
        if not streaming:
            balancer.backward(losses)
            return
        for task, loss in enumerate(losses):
            balancer.accumulate(task, loss, retain_graph=task < NUM_TASKS - 1)
        balancer.finish()

    return step


def balancer_for(net: Net, **options) -> ExcessMTL:
    return published(net.encoder.parameters(), num_tasks=NUM_TASKS, **options)


def is_kept(grad: torch.Tensor | None, balancer: Balancer) -> bool:
    kept = balancer.engine.heap_pin._gradient
    return grad is not None and kept is not None and kept.data_ptr() == grad.data_ptr()


def test_the_peak_is_that_of_the_allocator():
    standing = [torch.ones(1000)]

    def run() -> torch.Tensor:
        kept = torch.empty(1000, dtype=torch.float32)
        passing = torch.empty(5000, dtype=torch.float32)
        del passing
        standing.clear()
        return torch.cat([kept, torch.empty(2000, dtype=torch.float32)])

    # 1,000 and 5,000 together; later 1,000 fewer that were there before, 1,000, 2,000 and the 3,000 of both.
    assert memory.measured_peak(run, torch.device("cpu")) == 4 * 6000


@pytest.mark.parametrize("streaming", [False, True], ids=["backward", "streamed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_momentum": 0.9}, {"state_dtype": torch.bfloat16}, {"min_weight": 0.01}],
    ids=str,
)
def test_counted_bytes_of_a_step_are_those_that_the_allocator_had(options, streaming):
    """Within 5 %: the rest is activations, heads and numbers per task."""
    net = Net()
    balancer = balancer_for(net, **options)
    step = step_of(balancer, net, streaming=streaming)
    first = balancer.memory_report(step)
    dropped = 0 if is_kept(net.encoder.weight.grad, balancer) else 4 * P
    again = balancer.memory_report(step)
    counted = again.total_bytes("streamed step" if streaming else "step")
    # What a step starts with is not counted as added, and it drops the `.grad` of the step before: that much less,
    # unless this is the gradient that is kept, which addresses decide.
    assert again.measured_bytes + dropped == pytest.approx(counted, rel=0.05)
    # The first step makes no state, and drops no `.grad`.
    assert first.measured_bytes == pytest.approx(counted, rel=0.05)


def test_state_is_counted_by_tensor_and_halves_in_bfloat16():
    reports = {}
    for dtype in (None, torch.bfloat16):
        net = Net()
        balancer = balancer_for(net, gradient_momentum=0.9, state_dtype=dtype)
        reports[dtype] = balancer.memory_report(step_of(balancer, net))
    held = {
        dtype: {entry.name: entry.num_bytes for entry in report.entries if entry.when == "always"}
        for dtype, report in reports.items()
    }
    assert held[None]["sq_grad_sum"] == held[None]["grad_mean"] == 4 * NUM_TASKS * P
    assert held[torch.bfloat16]["sq_grad_sum"] == 2 * NUM_TASKS * P
    assert held[None]["per task"] == held[torch.bfloat16]["per task"] < 1000


def test_cheaper_steps_and_other_balancers_count_what_they_hold():
    net = Net()
    rotating = balancer_for(net, tasks_per_step=1)
    assert rotating.memory_report().total_bytes("step") < 2.1 * 4 * P
    dro = GroupDRO(net.encoder.parameters(), num_tasks=NUM_TASKS)
    report = dro.memory_report()
    assert report.total_bytes("step") == 4 * P
    assert report.state_bytes < 1000


def test_report_prints_every_kind_and_how_the_peak_was_measured():
    net = Net()
    balancer = balancer_for(net)
    printed = str(balancer.memory_report())
    assert "resident set" in printed
    assert balancer.memory_report().measured_bytes > 50 * 2**20  # an interpreter with torch
    printed = str(balancer.memory_report(step_of(balancer, net)))
    parts = [
        "6 tasks and 262,144",
        "sq_grad_sum",
        "gradients",
        "running sums",
        "temporaries",
        "what `step` added",
    ]
    for part in parts:
        assert part in printed


def test_report_without_any_size_says_what_to_do():
    with pytest.raises(ValueError, match="after the first step"):
        published(num_tasks=2).memory_report()
