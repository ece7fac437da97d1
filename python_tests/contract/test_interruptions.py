"""Ctrl-C between and inside steps, two threads with a balancer each, and forks of a process that has stepped."""

from __future__ import annotations

import copy
import linecache
import os
import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _inputs import Problem, make_problem
from _published import published
from _ranks import CONTEXT
from test_faults import FAULTY, METHODS, Run, make_run
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import excessmtl_ext
from excessmtl_ext import MOML, Balancer, ExcessMTL, GroupDRO
from excessmtl_ext.training import TrainConfig, train

PACKAGE = str(Path(excessmtl_ext.__file__).parent)

every_method = pytest.mark.parametrize("name", METHODS)


# ---- inside a step


def copy_of(run: Run) -> Run:
    model, balancer = copy.deepcopy((run.model, run.balancer))
    return Run(run.network, model, balancer, torch.optim.Adam(model.parameters(), lr=1e-2))


@every_method
def test_an_interrupt_in_a_backward_pass_changes_no_state(name):
    run = make_run(name, "mlp")
    for number in range(3):
        run.step(number)
    if isinstance(run.balancer, MOML):
        run.balancer.observe_validation(run.losses(3))
    before, weights = run.state(), run.parameters()
    shared = [p.grad.clone() for p in run.model.encoder.parameters()]
    losses = run.losses(3)

    def interrupt(grad: Tensor) -> None:
        raise KeyboardInterrupt

    losses[FAULTY].register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.balancer.backward(losses)
    assert all(map(torch.equal, run.state().values(), before.values()))
    # The gradients that were there before the step are there again.
    assert all(map(torch.equal, [p.grad for p in run.model.encoder.parameters()], shared))
    assert all(map(torch.equal, run.parameters(), weights))
    assert run.step(3)
    run.assert_sound(name)


class InterruptAtLine:
    """Raises KeyboardInterrupt before the n-th line of the package that runs: where Python may take a signal.

    Not before a ``with`` line, which is also the last of its block: Python takes no signal between the end of a block
    and its ``__exit__``, a tracer does.
    """

    def __init__(self, line: int) -> None:
        self.line = line
        self.num_seen = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not text.lstrip().startswith("with "):
            self.num_seen += 1
            if self.num_seen == self.line:
                raise KeyboardInterrupt
        return self

    def step(self, run: Run, number: int) -> bool:
        """Whether the step was interrupted."""
        traced = sys.gettrace()
        sys.settrace(self)
        try:
            run.weigh(number)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(traced)
        return False


@every_method
def test_an_interrupt_at_any_line_of_a_step_leaves_each_part_as_before_or_after(name):
    run = make_run(name, "mlp")
    for number in range(2):
        run.step(number)
    before = run.state()
    whole = copy_of(run)
    counter = InterruptAtLine(0)
    assert not counter.step(whole, 2)
    after = whole.state()
    num_lines = counter.num_seen
    assert num_lines > 20
    for line in range(1, num_lines + 1, 1 + num_lines // 60):  # some sixty of them
        struck = copy_of(run)
        assert InterruptAtLine(line).step(struck, 2)
        for key, value in struck.state().items():
            is_either = torch.equal(value, before[key]) or torch.equal(value, after[key])
            assert is_either, f"{key} is neither after an interrupt at line {line} of {num_lines}"
        struck.assert_sound(name)
        struck.optimizer.zero_grad()
        assert struck.step(3)
        struck.assert_sound(name)


def test_a_streamed_step_that_was_interrupted_can_be_finished_without_the_task():
    problem = make_problem()
    balancer = published(problem.encoder.parameters(), num_tasks=3)
    losses = problem.losses()
    balancer.accumulate(0, losses[0], retain_graph=True)

    def interrupt(grad: Tensor) -> None:
        raise KeyboardInterrupt

    losses[1].register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        balancer.accumulate(1, losses[1], retain_graph=True)
    balancer.finish()
    assert balancer.num_task_steps.tolist() == [1, 0, 0]
    assert bool(balancer.task_weights.isfinite().all())
    problem.zero_grad()
    balancer.backward(problem.losses())
    assert balancer.num_task_steps.tolist() == [2, 1, 1]


# ---- Ctrl-C on a run

# 300 samples in batches of 50: 6 steps an epoch.
CONFIG = TrainConfig(
    dataset="digits",
    method="excessmtl-recommended",
    epochs=4,
    batch_size=50,
    lr=1e-3,
    num_train=300,
    task_weight_interval=1,
)
RESULTS = ("metrics.csv", "task_weights.csv", "metrics.json", "config.json")


def train_until_interrupted(folder: str, pipe: Any, point: int | None) -> None:
    """Trains, and sends itself SIGINT at the call or return number ``point`` of the package's functions."""
    torch.set_num_threads(1)
    num_events = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal num_events
        if event in ("call", "return") and frame.f_code.co_filename.startswith(PACKAGE):
            num_events += 1
            if num_events == point:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        train(CONFIG, folder, resume=True)
    except KeyboardInterrupt:
        os._exit(130)
    sys.setprofile(None)
    pipe.send(num_events)


def run_until(folder: Path, point: int | None) -> tuple[int | None, int]:
    """Trains in a process of its own; exit status, and how many calls and returns there were until the end."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=train_until_interrupted, args=(str(folder), theirs, point))
    process.start()
    theirs.close()
    try:
        num_events = ours.recv()
    except EOFError:  # it was interrupted
        num_events = 0
    process.join()
    return process.exitcode, num_events


@pytest.mark.slow
def test_ctrl_c_at_random_points_leaves_a_run_that_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Without a handler: KeyboardInterrupt wherever Python is, in a step, in an evaluation or in a write."""
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    status, num_events = run_until(undisturbed, None)
    assert status == 0
    draw = random.Random(0)
    # Each ends before a quarter of the run: three of them cannot reach its end.
    for _ in range(3):
        assert run_until(interrupted, draw.randrange(1, num_events // 4))[0] == 130
    assert run_until(interrupted, None)[0] == 0
    for name in RESULTS:
        assert (interrupted / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not list(interrupted.glob("*.tmp"))


# ---- threads


def trained(problem: Problem, balancer: Balancer, verb: str) -> list[Tensor]:
    optimizer = torch.optim.Adam(problem.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        losses = problem.losses()
        if verb == "forward":
            balancer(losses).backward()
        else:
            balancer.backward(losses)
        optimizer.step()
    return [
        *balancer.state_tensors().values(),
        *(parameter.detach() for parameter in problem.parameters()),
    ]


@pytest.mark.parametrize("verb", ["backward", "forward"])
def test_threads_with_a_balancer_each_train_as_one_after_the_other(verb):
    def make(index: int) -> tuple[Problem, Balancer]:
        problem = make_problem(seed=index)
        method = (ExcessMTL, GroupDRO, ExcessMTL)[index]
        return problem, method(problem.encoder.parameters(), num_tasks=3, robust_step_size=0.1)

    expected = [trained(*make(index), verb) for index in range(3)]
    # Made before the threads start: they share torch's generator.
    made = [make(index) for index in range(3)]
    results: dict[int, list[Tensor]] = {}
    ready = threading.Barrier(3)

    def work(index: int) -> None:
        ready.wait()
        results[index] = trained(*made[index], verb)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # a thousand times more often than by default
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for index in range(3):
        assert_equal_bits(results[index], expected[index])


# ---- forks


class Weights(Dataset[Tensor]):
    """The weights after three steps, computed by the worker that is asked."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return weights_of_large_steps(index)


def weights_of_large_steps(seed: int) -> Tensor:
    """Steps over enough elements for several threads."""
    generator = torch.Generator().manual_seed(seed)
    balancer = published(num_tasks=2, robust_step_size=0.5)
    for _ in range(3):
        balancer.update_weights(torch.randn(2, 200_000, generator=generator))
    return balancer.task_weights


# From Python 3.12 on, a fork of a process with threads warns; torch's default on Linux forks all the same.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_forked_after_steps_of_the_parent_compute_the_same() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [weights_of_large_steps(index) for index in range(4)]  # the threads exist now
    finally:
        torch.set_num_threads(num_threads)
    loader = DataLoader(Weights(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert_equal_bits(list(loader), expected)
