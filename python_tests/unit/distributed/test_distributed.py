"""Several ranks against one process with the joined batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _inputs import make_problem
from _published import published
from _rank_model import NUM_TASKS, TOLERANCE, Net, losses_of, own_rows
from _ranks import raised_by, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL, _extension
from excessmtl_ext.distributed import DataParallel, Ranks

NUM_STEPS = 6
DEFAULT = {
    "robust_step_size": None,
    "combine": None,
    "fisher": "linear",
    "gradient_momentum": 0.98,
    "eps": 1e-30,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "official": {"robust_step_size": 0.1},
    "paper": {"robust_step_size": 0.1, "fisher": "linear", "num_warmup_steps": 2},
    "momentum": {"robust_step_size": 1.0, "fisher": "linear", "gradient_momentum": 0.9},
    "weighted_heads": {
        "robust_step_size": 0.1,
        "head_weighting": "task_weights",
        "weight_scale": "num_tasks",
    },
    "default": {**DEFAULT, "update_every": 2},
    "every_second": {"robust_step_size": 0.1, "update_every": 2, "min_weight": 0.05},
}

# Rank 0 of four has 2 of 20 samples, the last one 8.
UNEVEN = {1: [20], 2: [4, 16], 4: [2, 4, 6, 8]}


def snapshot(balancer: ExcessMTL, model: nn.Module) -> dict[str, Tensor]:
    state = {
        "weights": balancer.task_weights.clone(),
        "risks": balancer.excess_risk.clone(),
        "relative": balancer.relative_excess_risk.clone(),
    }
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        state[f"grad {name}"] = parameter.grad.clone()
    return state


def train(
    rank: int,
    num_ranks: int,
    options: dict[str, Any],
    sizes: list[int],
    verb: str = "backward",
    ddp: dict[str, Any] | None = None,
) -> list[dict[str, Tensor]]:
    """Weights, risks and gradients after each step; ``num_ranks`` 1 needs no group."""
    problem = make_problem(NUM_TASKS)
    net = Net(problem)
    model = net if ddp is None else DistributedDataParallel(net, **ddp)
    ranks: dict[str, Any] = {}
    if num_ranks > 1:
        ranks = {"process_group": dist.group.WORLD, "model": model}
    balancer = published(net.encoder.parameters(), num_tasks=NUM_TASKS, **options, **ranks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    states = []
    for _ in range(NUM_STEPS):
        inputs = torch.randn(20, 6, generator=generator)
        rows = own_rows(rank, sizes)
        losses = losses_of(model(inputs[rows]), problem.targets[rows])
        optimizer.zero_grad()
        num_samples = sizes[rank] if len(set(sizes)) > 1 else None
        if verb == "backward":
            balancer.backward(losses, num_samples=num_samples)
        else:
            balancer(losses, num_samples=num_samples).backward()
        states.append(snapshot(balancer, net))
        optimizer.step()
    return states


def assert_same(results: list[list[dict[str, Tensor]]], expected: list[dict[str, Tensor]]) -> None:
    """Equal to one process to the tolerance, and to each other to the bit."""
    for step, states in enumerate(zip(*results, strict=True)):
        for name, value in states[0].items():
            torch.testing.assert_close(
                value, expected[step][name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
            )
            for other in states[1:]:
                assert torch.equal(value, other[name]), f"step {step}: {name} differs over ranks"


@pytest.mark.parametrize("verb", ["backward", "forward"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_ranks_equal_one_process_on_the_joined_batch(
    options: dict[str, Any], verb: str
) -> None:
    results = run_ranks(2, train, options, [10, 10], verb)
    assert_same(results, train(0, 1, options, [20]))


@pytest.mark.parametrize("options", [OPTIONS["official"], OPTIONS["momentum"], DEFAULT], ids=str)
def test_four_ranks_equal_one_process_on_the_joined_batch(options: dict[str, Any]) -> None:
    assert_same(run_ranks(4, train, options, [5] * 4), train(0, 1, options, [20]))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_batches_of_unequal_size_are_weighted_by_their_samples(num_ranks: int) -> None:
    results = run_ranks(num_ranks, train, OPTIONS["official"], UNEVEN[num_ranks])
    assert_same(results, train(0, 1, OPTIONS["official"], [20]))


DDP = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "unused_views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static_views": {"static_graph": True, "gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("verb", ["backward", "forward"])
@pytest.mark.parametrize("ddp", DDP.values(), ids=DDP)
def test_a_ddp_model_gives_the_gradients_of_one_process(ddp: dict[str, Any], verb: str) -> None:
    results = run_ranks(2, train, OPTIONS["official"], [10, 10], verb, ddp)
    assert_same(results, train(0, 1, OPTIONS["official"], [20]))


@pytest.mark.parametrize("name", ["weighted_heads", "every_second"])
def test_a_ddp_model_keeps_the_options_of_heads_and_intervals(name: str) -> None:
    results = run_ranks(2, train, OPTIONS[name], UNEVEN[2], "backward", {})
    assert_same(results, train(0, 1, OPTIONS[name], [20]))


def accumulate_with_no_sync(rank: int, num_ranks: int) -> list[dict[str, Tensor]]:
    problem = make_problem(NUM_TASKS)
    net = Net(problem)
    model = DistributedDataParallel(net) if num_ranks > 1 else net
    ranks = {"model": model} if num_ranks > 1 else {}
    balancer = published(net.encoder.parameters(), num_tasks=NUM_TASKS, **ranks)
    rows = own_rows(rank, [20 // num_ranks] * num_ranks)
    states = []
    for _ in range(2):  # twice: the reducer must be left ready for the next round
        for parameter in net.parameters():
            parameter.grad = None
        losses = losses_of(model(problem.inputs[rows]), problem.targets[rows])
        if num_ranks > 1:
            with model.no_sync():
                first = losses_of(model(problem.inputs[rows]), problem.targets[rows])
                balancer.backward(first)
        else:
            balancer.backward(losses_of(model(problem.inputs[rows]), problem.targets[rows]))
        losses = losses_of(model(problem.inputs[rows] * 2), problem.targets[rows])
        balancer.backward(losses)
        states.append(snapshot(balancer, net))
    return states


def test_gradients_accumulate_under_no_sync() -> None:
    assert_same(run_ranks(2, accumulate_with_no_sync), accumulate_with_no_sync(0, 1))


def mix_with_other_losses(rank: int, num_ranks: int, has_own_hook: bool) -> list[dict[str, Tensor]]:
    """A plain loss accumulated under no_sync before a balanced step, and one alone after it."""
    problem = make_problem(NUM_TASKS)
    net = Net(problem)
    model, ranks, waiting = net, {}, nullcontext
    if num_ranks > 1:
        model = DistributedDataParallel(net)
        if has_own_hook:
            model.register_comm_hook(None, default_hooks.allreduce_hook)
        ranks, waiting = {"model": model}, model.no_sync
    balancer = published(net.encoder.parameters(), num_tasks=NUM_TASKS, **ranks)
    rows = own_rows(rank, [20 // num_ranks] * num_ranks)

    def losses() -> list[Tensor]:
        return losses_of(model(problem.inputs[rows]), problem.targets[rows])

    states = []
    for _ in range(2):
        net.zero_grad()
        with waiting():
            torch.stack(losses()).sum().backward()
        balancer.backward(losses())
        states.append(snapshot(balancer, net))
        net.zero_grad()
        torch.stack(losses()).prod().backward()
        if num_ranks == 1:  # the product of means over the rank's own rows, averaged
            net.zero_grad()
            halves = [slice(0, 10), slice(10, 20)]
            for half in halves:
                own = losses_of(net(problem.inputs[half]), problem.targets[half])
                (torch.stack(own).prod() / 2).backward()
        states.append(snapshot(balancer, net))
    return states


@pytest.mark.parametrize("has_own_hook", [False, True], ids=["", "own_hook"])
def test_gradients_of_other_losses_are_averaged_as_ever(has_own_hook: bool) -> None:
    expected = mix_with_other_losses(0, 1, has_own_hook)
    assert_same(run_ranks(2, mix_with_other_losses, has_own_hook), expected)


# ---- absent tasks, parameters out of reach


def train_with_absent(rank: int, num_ranks: int, ddp: dict[str, Any] | None) -> Any:
    """Task 1 is on the last rank alone, task 2 nowhere in the second step."""
    problem = make_problem(NUM_TASKS)
    net = Net(problem)
    model = net if ddp is None or num_ranks == 1 else DistributedDataParallel(net, **ddp)
    ranks: dict[str, Any] = {}
    if num_ranks > 1:
        ranks = {"process_group": dist.group.WORLD, "model": model}
    balancer = published(net.encoder.parameters(), num_tasks=NUM_TASKS, **ranks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    rows = own_rows(rank, [20 // num_ranks] * num_ranks)
    last = own_rows(num_ranks - 1, [20 // num_ranks] * num_ranks) if num_ranks > 1 else None
    states = []
    for step in range(4):
        outputs = model(problem.inputs[rows])
        losses: list[Tensor | None] = [*losses_of(outputs, problem.targets[rows])]
        if num_ranks == 1:  # the joined batch: task 1 is labelled in the last quarter or half
            half = slice(10, 20)
            losses[1] = ((outputs[1][half] - problem.targets[half, 1]) ** 2).mean()
        elif rank != num_ranks - 1:
            assert last is not None
            losses[1] = None
        if step == 1:
            losses[2] = None
        optimizer.zero_grad()
        balancer.backward(losses)
        states.append(
            {
                "weights": balancer.task_weights.clone(),
                **{
                    f"grad {name}": torch.zeros_like(parameter)
                    if parameter.grad is None
                    else parameter.grad.clone()
                    for name, parameter in net.named_parameters()
                },
            }
        )
        optimizer.step()
    return states


@pytest.mark.parametrize(
    "ddp",
    [None, {}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=["plain_model", "ddp", "ddp_unused", "ddp_static"],
)
def test_a_task_absent_on_a_rank_counts_for_the_others(ddp: dict[str, Any] | None) -> None:
    assert_same(run_ranks(2, train_with_absent, ddp), train_with_absent(0, 1, ddp))


def train_with_an_idle_rank(
    rank: int, num_ranks: int, kind: str, ddp: dict[str, Any] | None
) -> list[dict[str, Tensor]]:
    """The last rank has no sample: it passes no loss, or one of a sample that weighs nothing."""
    problem = make_problem(NUM_TASKS)
    net = Net(problem)
    model = net if ddp is None or num_ranks == 1 else DistributedDataParallel(net, **ddp)
    ranks: dict[str, Any] = {}
    if num_ranks > 1:
        ranks = {"process_group": dist.group.WORLD, "model": model}
    balancer = published(net.encoder.parameters(), num_tasks=NUM_TASKS, **ranks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    is_idle = rank == 1
    states = []
    for _ in range(3):
        losses: list[Any] = losses_of(
            model(problem.inputs[:1] if is_idle else problem.inputs),
            problem.targets[:1] if is_idle else problem.targets,
        )
        if is_idle and kind == "no_loss":
            losses = [None] * NUM_TASKS
        optimizer.zero_grad()
        balancer.backward(losses, num_samples=0 if is_idle else 20)
        states.append(snapshot(balancer, net))
        optimizer.step()
    return states


@pytest.mark.parametrize(
    ("kind", "ddp"),
    [
        ("no_loss", None),
        ("no_loss", {}),
        ("no_weight", None),
        ("no_weight", {}),
        ("no_weight", {"find_unused_parameters": True}),
        ("no_weight", {"static_graph": True}),
    ],
    ids=str,
)
def test_a_rank_without_samples_changes_nothing(kind: str, ddp: dict[str, Any] | None) -> None:
    results = run_ranks(2, train_with_an_idle_rank, kind, ddp)
    assert_same(results, train_with_an_idle_rank(0, 1, kind, ddp))


def step_with_a_branch(rank: int, num_ranks: int) -> list[bool]:
    """Parameter 1 is used on rank 1 alone, parameter 2 nowhere."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    balancer = published(parameters, num_tasks=2, process_group=dist.group.WORLD)
    used = parameters[0].sum() + (parameters[1].sum() if rank == 1 else 0.0)
    balancer.backward([used, used**2])
    assert num_ranks == 2
    if rank == 0:
        assert parameters[1].grad is not None
        # Half of 0.5 * 1 + 0.5 * 2 * 6: the mean over ranks under uniform weights.
        torch.testing.assert_close(parameters[1].grad, torch.full((3,), 3.25))
    return [parameter.grad is not None for parameter in parameters]


def rest(rank: int, num_ranks: int) -> list[bool]:
    problem = make_problem(NUM_TASKS)
    balancer = published(
        problem.encoder.parameters(),
        num_tasks=NUM_TASKS,
        process_group=dist.group.WORLD,
        model=nn.ModuleList([problem.encoder, problem.heads]),
    )
    balancer.backward(problem.losses())
    problem.zero_grad()
    before = {name: tensor.clone() for name, tensor in balancer.state_tensors().items()}
    balancer.backward([None] * NUM_TASKS)
    assert all(parameter.grad is None for parameter in problem.parameters())
    return [torch.equal(tensor, before[name]) for name, tensor in balancer.state_tensors().items()]


def test_a_batch_without_any_task_on_all_ranks_is_no_step() -> None:
    for unchanged in run_ranks(2, rest):
        assert all(unchanged)


def test_a_parameter_without_gradient_keeps_none_unless_some_rank_reached_it() -> None:
    assert run_ranks(2, step_with_a_branch) == [[True, True, False]] * 2


# ---- what is sent and what is kept


def written_bytes() -> int:
    """What the process has written to files and sockets, from the kernel."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def measure(
    rank: int, num_ranks: int, num_tasks: int, reduce: str, ddp: str | None = None
) -> tuple[int, int, int, int]:
    generator = torch.Generator().manual_seed(rank)
    encoder = nn.Linear(400, 300)
    model: nn.Module = encoder
    ranks: dict[str, Any] = {"process_group": dist.group.WORLD}
    if ddp is not None:
        model = DistributedDataParallel(encoder)
        if ddp == "own_hook":
            model.register_comm_hook(None, default_hooks.allreduce_hook)
        ranks = {"model": model}
    balancer = published(encoder.parameters(), num_tasks=num_tasks, reduce=reduce, **ranks)

    def step() -> None:
        encoder.zero_grad()
        features = model(torch.randn(2, 400, generator=generator))
        balancer.backward([(features**2).mean() * (1 + task) for task in range(num_tasks)])

    step()  # the first one opens connections,
    step()  # and before the second DistributedDataParallel arranges its buckets anew
    assert isinstance(balancer.engine, DataParallel)
    counted, written = balancer.engine.ranks.num_bytes_sent, written_bytes()
    step()
    counted = balancer.engine.ranks.num_bytes_sent - counted
    assert balancer.sq_grad_sum.shape[0] == num_tasks
    return (
        written_bytes() - written,
        counted,
        sum(parameter.numel() for parameter in encoder.parameters()),
        balancer.sq_grad_sum.numel(),
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_sends_at_most_one_gradient_per_task_and_one_more(num_ranks: int) -> None:
    num_tasks = 3
    for written, counted, num_params, state_numel in run_ranks(
        num_ranks, measure, num_tasks, "grads"
    ):
        share = (num_ranks - 1) / num_ranks
        assert written <= (num_tasks + 1) * num_params * 4
        assert counted == pytest.approx(share * (num_tasks + 1) * num_params * 4, rel=1e-3)
        assert written == pytest.approx(counted, rel=0.01)  # gloo's own headers
        assert state_numel <= num_tasks * (num_params / num_ranks + 32)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("ddp", "num_gradients"), [("plain", 4), ("own_hook", 5)])
def test_a_ddp_model_sends_no_more_unless_it_has_a_hook_of_its_own(
    ddp: str, num_gradients: int, num_ranks: int
) -> None:
    """T + 1 gradients of P elements; with another communication hook T + 2."""
    for written, _, num_params, _ in run_ranks(num_ranks, measure, 3, "grads", ddp):
        share = (num_ranks - 1) / num_ranks
        assert written == pytest.approx(share * num_gradients * num_params * 4, rel=0.01)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_averaged_risks_cost_no_more_than_plain_data_parallel(num_ranks: int) -> None:
    for written, _, num_params, state_numel in run_ranks(num_ranks, measure, 3, "risks"):
        share = (num_ranks - 1) / num_ranks
        assert written == pytest.approx(2 * share * num_params * 4, rel=0.01)
        assert state_numel >= 3 * num_params


def approximate(rank: int, num_ranks: int, is_same_batch: bool) -> list[dict[str, Tensor]]:
    problem = make_problem(NUM_TASKS)
    net = Net(problem)
    ranks: dict[str, Any] = {}
    if num_ranks > 1:
        ranks = {"process_group": dist.group.WORLD, "model": net, "reduce": "risks"}
    balancer = published(net.encoder.parameters(), num_tasks=NUM_TASKS, **ranks)
    rows = slice(0, 20) if is_same_batch else own_rows(rank, [20 // num_ranks] * num_ranks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    states = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        balancer.backward(losses_of(net(problem.inputs[rows]), problem.targets[rows]))
        states.append(snapshot(balancer, net))
        optimizer.step()
    return states


def test_averaged_risks_are_exact_where_all_ranks_see_the_same() -> None:
    assert_same(run_ranks(2, approximate, True), approximate(0, 1, True))


def test_averaged_risks_overestimate_where_batches_differ() -> None:
    results = run_ranks(2, approximate, False)
    assert_same(results, results[0])  # the ranks agree to the bit all the same
    # Jensen: the mean of |g_r|^2 is at least |mean of g_r|^2, coordinate by coordinate.
    assert (results[0][0]["risks"] > approximate(0, 1, False)[0]["risks"]).all()


# ---- gradients of one's own


def update(rank: int, num_ranks: int, reduce: str = "grads") -> Tensor:
    """The weights after five steps; task 1 is absent in the third, all are in the fourth."""
    generator = torch.Generator().manual_seed(0)
    shared = [torch.zeros(7, 3, requires_grad=True), torch.zeros(5, requires_grad=True)]
    ranks: dict[str, Any] = {"process_group": dist.group.WORLD} if num_ranks > 1 else {}
    balancer = published(shared, num_tasks=2, robust_step_size=0.5, reduce=reduce, **ranks)
    for number in range(5):
        grads = torch.randn(4, 2, 26, generator=generator)
        own = grads[rank * (4 // num_ranks) : (rank + 1) * (4 // num_ranks)].mean(0)
        if reduce == "risks":  # which is exact where all ranks see the same
            own = grads.mean(0)
        rows: list[list[Tensor]] = [[row[:21].view(7, 3), row[21:]] for row in own]
        if number == 2:
            rows[1] = []
        balancer.update_weights([[None, None]] * 2 if number == 3 else rows)
    assert balancer.num_task_steps.tolist() == [4, 3]
    return balancer.task_weights


@pytest.mark.parametrize(("num_ranks", "reduce"), [(2, "grads"), (4, "grads"), (2, "risks")])
def test_update_weights_averages_what_it_is_given(num_ranks: int, reduce: str) -> None:
    results = run_ranks(num_ranks, update, reduce)
    torch.testing.assert_close(results[0], update(0, 1), **TOLERANCE)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- arguments, without a group


def test_arguments_without_ranks_are_refused() -> None:
    encoder = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Expected `process_group`, or a `model`"):
        published(encoder.parameters(), num_tasks=2, model=encoder)
    with pytest.raises(ValueError, match="Expected `reduce` to be one of"):
        published(encoder.parameters(), num_tasks=2, reduce="mean")  # type: ignore[arg-type]


def refuse(rank: int, num_ranks: int) -> list[tuple[str, str]]:
    encoder = nn.Linear(3, 2)
    balancer = published(encoder.parameters(), num_tasks=2, process_group=dist.group.WORLD)
    group = dist.group.WORLD
    assert Ranks(group).size == num_ranks and Ranks(group).rank == rank  # type: ignore[arg-type]
    return [
        raised_by(lambda: published(num_tasks=2, process_group=group)),
        raised_by(lambda: balancer.accumulate(0, encoder(torch.ones(1, 3)).sum())),
        raised_by(lambda: balancer.record_history(gradients=True)),
    ]


def test_what_needs_one_process_is_refused_at_once() -> None:
    for without_parameters, streaming, history in run_ranks(2, refuse):
        assert without_parameters[1].startswith("Expected `shared_parameters` with `process_group`")
        assert streaming[0] == history[0] == "NotImplementedError"


def loaded_package(rank: int, num_ranks: int) -> tuple[str, bool]:
    return str(_extension.__file__), _extension.ops_available


def test_ranks_run_the_package_under_test() -> None:
    """Not the source folder that pytest was started in."""
    assert run_ranks(2, loaded_package) == [(_extension.__file__, _extension.ops_available)] * 2
