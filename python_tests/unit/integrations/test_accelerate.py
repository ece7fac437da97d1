"""Hugging Face Accelerate: its backward, gradient accumulation, saved state and trackers."""

from __future__ import annotations

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published

from excessmtl_ext import ExcessMTL, GroupDRO

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker

from excessmtl_ext.integrations.accelerate import log_task_weights, prepare_balancer

METHODS = {
    "ExcessMTL": lambda p: published(p, num_tasks=3, robust_step_size=0.5),
    "official": lambda p: ExcessMTL.from_preset("official", p, num_tasks=3, robust_step_size=0.5),
    "GroupDRO": lambda p: GroupDRO(p, num_tasks=3, robust_step_size=0.1),
}


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate keeps its settings per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Model(torch.nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.encoder, self.heads = problem.encoder, problem.heads

    def forward(self, inputs, targets):
        features = self.encoder(inputs)
        return [
            (head(features)[:, 0] - targets[:, task]).square().mean()
            for task, head in enumerate(self.heads)
        ]


def start(make, **options):
    problem = make_problem()
    accelerator = Accelerator(cpu=True, **options)
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(Model(problem), optimizer)
    balancer = prepare_balancer(accelerator, make(problem.encoder.parameters()))
    return problem, accelerator, model, optimizer, balancer


def train(problem, accelerator, model, optimizer, balancer, num_steps, *, own_backward=False):
    for _ in range(num_steps):
        with accelerator.accumulate(model):
            losses = model(problem.inputs, problem.targets)
            if own_backward:
                balancer.backward(losses)
            else:
                accelerator.backward(balancer(losses))
            optimizer.step()
            optimizer.zero_grad()


def own_loop(make, num_steps, accumulate=1):
    problem = make_problem()
    balancer = make(problem.encoder.parameters())
    optimizer = torch.optim.SGD(problem.parameters(), lr=0.05)
    for step in range(num_steps):
        balancer.backward(
            Model(problem)(problem.inputs, problem.targets), grad_scale=1 / accumulate
        )
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
    return problem, balancer


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))
def test_training_is_that_of_a_loop_of_ones_own(make, own_backward):
    problem, *rest, balancer = start(make)
    train(problem, *rest, balancer, 6, own_backward=own_backward)
    expected, reference = own_loop(make, 6)
    assert torch.equal(balancer.task_weights, reference.task_weights)
    assert_equal_bits(problem.parameters(), expected.parameters())


def test_accumulation_divides_the_gradients_and_not_the_risk():
    problem, *rest, balancer = start(METHODS["ExcessMTL"], gradient_accumulation_steps=2)
    train(problem, *rest, balancer, 6)
    expected, reference = own_loop(METHODS["ExcessMTL"], 6, accumulate=2)
    assert torch.equal(balancer.task_weights, reference.task_weights)
    assert_equal_bits(problem.parameters(), expected.parameters())


def test_bfloat16_autocast_works():
    problem, *rest, balancer = start(METHODS["ExcessMTL"], mixed_precision="bf16")
    train(problem, *rest, balancer, 4)
    assert balancer.num_steps.item() == 4
    assert balancer.task_weights.std() > 0


def test_saved_state_resumes_bit_for_bit(tmp_path):
    problem, accelerator, *rest, balancer = start(METHODS["ExcessMTL"])
    train(problem, accelerator, *rest, balancer, 3)
    accelerator.save_state(str(tmp_path))
    train(problem, accelerator, *rest, balancer, 3)
    expected = [parameter.detach().clone() for parameter in problem.parameters()]
    weights = balancer.task_weights.clone()
    AcceleratorState._reset_state(reset_partial_state=True)

    problem, accelerator, *rest, balancer = start(METHODS["ExcessMTL"])
    accelerator.load_state(str(tmp_path))
    assert balancer.num_steps.item() == 3
    train(problem, accelerator, *rest, balancer, 3)
    assert torch.equal(balancer.task_weights, weights)
    assert_equal_bits(problem.parameters(), expected)


class ListTracker(GeneralTracker):
    name = "list"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict]] = []

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, values))


def test_trackers_receive_the_weights_under_the_tasks_names():
    tracker = ListTracker()
    problem, accelerator, *rest, balancer = start(METHODS["ExcessMTL"], log_with=tracker)
    accelerator.init_trackers("run")
    train(problem, accelerator, *rest, balancer, 4)
    log_task_weights(accelerator, balancer, step=4, task_names=["a", "b", "c"])
    ((step, row),) = tracker.rows
    assert step == 4
    assert [row[f"task_weight/{name}"] for name in "abc"] == balancer.task_weights.tolist()
    assert row["effective_num_tasks"] == balancer.effective_num_tasks.item()
    assert len(set(row.values())) == 4
