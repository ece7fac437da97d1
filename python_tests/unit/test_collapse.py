"""The collapse guard: what counts as a collapse, when it speaks, and that it changes nothing."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from _asserts import assert_equal_bits, never_waiting_for_the_gpu
from _published import published
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL, GroupDRO, TaskCollapseWarning, Uniform
from excessmtl_ext.collapse import (
    CALLS_PER_LOOK,
    FEWEST_EFFECTIVE_TASKS,
    LOOKS_COLLAPSED,
    LOOKS_REMEMBERED,
    CollapseGuard,
    effective_num_tasks,
)
from excessmtl_ext.data import load_digit_pairs
from excessmtl_ext.excess_mtl import Preset
from excessmtl_ext.models import mlp

PATIENCE = CALLS_PER_LOOK * LOOKS_COLLAPSED

COLLAPSED, EVEN = torch.tensor([0.97, 0.02, 0.01]), torch.tensor([0.4, 0.3, 0.3])
SIMILAR, JUSTIFIED = torch.tensor([0.5, 0.1, 0.4]), torch.tensor([0.5, 0.01, 0.04])


def train_digits(steps: int, preset: Preset, **options: object) -> ExcessMTL:
    """Two digits per image, no label noise."""
    torch.manual_seed(0)
    data = load_digit_pairs(noise=0.0, num_train=2_000)
    model = mlp((1, 12, 12), [10, 10], hidden=(32, 32))
    balancer = ExcessMTL.from_preset(preset, model.encoder.parameters(), num_tasks=2, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        inputs, targets = data.train.batch(torch.randint(0, 2_000, (128,), generator=generator))
        optimizer.zero_grad()
        losses = []
        for output, target in zip(model(inputs), targets, strict=True):
            assert target is not None  # every digit pair has both labels
            losses.append(nn.functional.cross_entropy(output, target))
        balancer.backward(losses)
        optimizer.step()
    return balancer


def feed(guard: CollapseGuard, weights: Tensor, risks: Tensor, calls: int, first: int = 1) -> None:
    for call in range(first, first + calls):
        guard.look(call, weights, risks)


def feed_noise(balancer: ExcessMTL, calls: int, seed: int = 0) -> None:
    """Gradients without a mean, equal in law for both tasks: whoever gets the weight does not deserve it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(calls):
        balancer.update_weights(torch.randn(2, 8, generator=generator))


def collapsing(**options: object) -> ExcessMTL:
    return published(num_tasks=2, robust_step_size=20.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([1, 1, 1, 1], 4.0), ([1, 0, 0], 1.0), ([3, 1], 1.6), ([5, 5, 0], 2.0)],
)
@pytest.mark.parametrize("total", [1.0, 3.0])
def test_effective_num_tasks_counts_equal_weights(shares, expected, total):
    weights = torch.tensor(shares, dtype=torch.float64)
    effective = effective_num_tasks(weights * total / weights.sum())
    assert effective.shape == ()
    assert effective.item() == pytest.approx(expected)


def test_every_balancer_tells_its_effective_number_of_tasks(device):
    balancer = GroupDRO(num_tasks=2, robust_step_size=1.0, weight_scale="num_tasks").to(device)
    assert balancer.effective_num_tasks.item() == pytest.approx(2.0)
    balancer.update_weights(losses=torch.tensor([1e3, 0.0]))
    assert balancer.effective_num_tasks.item() == pytest.approx(1.0)
    assert balancer.effective_num_tasks.device.type == device.type
    assert Uniform(num_tasks=7).effective_num_tasks.item() == pytest.approx(7.0)


def test_below_the_threshold_one_task_has_more_than_nine_tenths():
    """The sum of squares is at most the largest share, so fewer than 1.1 tasks mean a share above 1 / 1.1."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(20_000, 4, generator=generator).pow(20)
    shares /= shares.sum(1, keepdim=True)
    collapsed = torch.stack([effective_num_tasks(row) for row in shares]) < FEWEST_EFFECTIVE_TASKS
    assert 100 < int(collapsed.sum()) < 20_000
    assert shares[collapsed].max(1).values.min() > 0.9


def test_published_settings_collapse_at_zero_noise_and_the_floor_prevents_it():
    with pytest.warns(TaskCollapseWarning, match="min_weight") as caught:
        train_digits(600, "official", robust_step_size=1.0)
    assert len(caught) == 1
    # Here and below a warning would be an error.
    floored = train_digits(600, "official", robust_step_size=1.0, min_weight=0.25)
    assert floored.effective_num_tasks > 1.5


def test_the_recommended_preset_does_not_collapse_at_zero_noise():
    assert train_digits(600, "recommended").effective_num_tasks > 1.9


def test_collapse_without_reason_is_told_once_and_names_the_way_out():
    guard = CollapseGuard()
    feed(guard, COLLAPSED, SIMILAR, PATIENCE - 1)
    with pytest.warns(TaskCollapseWarning) as caught:
        feed(guard, COLLAPSED, SIMILAR, 1, first=PATIENCE)
    feed(guard, COLLAPSED, SIMILAR, 2 * PATIENCE, first=PATIENCE + 1)
    (warning,) = caught
    message = str(warning.message)
    assert "task 0 with 97.0%; effective number of tasks 1.06 after 200 steps" in message
    assert "task 2, while another was the heaviest, averaged 0.8 times" in message
    for way_out in ("min_weight=0.17", "smaller robust_step_size", "recommended"):
        assert way_out in message


@pytest.mark.parametrize(
    ("weights", "risks"),
    [
        (EVEN, SIMILAR),
        (COLLAPSED, JUSTIFIED),
        (COLLAPSED, torch.zeros(3)),
        (torch.full((3,), float("nan")), SIMILAR),
        (COLLAPSED, torch.full((3,), float("nan"))),
        (torch.ones(1), torch.ones(1)),
    ],
    ids=["even", "justified", "converged", "nan weights", "nan risks", "one task"],
)
def test_no_warning_where_there_is_nothing_to_warn_of(weights, risks):
    feed(CollapseGuard(), weights, risks, 3 * PATIENCE)


def test_one_loud_batch_does_not_cry_wolf():
    """A single look at which the others' risk seems large is averaged away by the quiet ones."""
    guard = CollapseGuard()
    for look in range(3 * LOOKS_REMEMBERED):
        guard.look((look + 1) * CALLS_PER_LOOK, COLLAPSED, SIMILAR if look == 2 else JUSTIFIED)


def test_a_passing_collapse_is_forgotten():
    guard = CollapseGuard()
    for look in range(5 * LOOKS_REMEMBERED):
        is_collapsed = look % LOOKS_REMEMBERED < LOOKS_COLLAPSED - 1
        guard.look((look + 1) * CALLS_PER_LOOK, COLLAPSED if is_collapsed else EVEN, SIMILAR)


def test_one_hot_weights_that_jump_between_tasks_are_a_collapse_too():
    """They pass through even ones on their way, and the heaviest task is another each time."""
    guard = CollapseGuard()
    with pytest.warns(TaskCollapseWarning):
        for look in range(LOOKS_REMEMBERED):
            weights = COLLAPSED.roll(look // 2) if look % 2 else EVEN
            guard.look((look + 1) * CALLS_PER_LOOK, weights, torch.ones(3))


def test_watching_changes_no_number(monkeypatch):
    watched, blind = collapsing(), collapsing()
    blind.observers.clear()
    with pytest.warns(TaskCollapseWarning):
        feed_noise(watched, 2 * PATIENCE)
    feed_noise(blind, 2 * PATIENCE)
    assert_equal_bits(list(watched.state_tensors().values()), list(blind.state_tensors().values()))


def test_a_resumed_run_is_not_warned_again_and_a_reset_one_is():
    balancer = collapsing()
    with pytest.warns(TaskCollapseWarning):
        feed_noise(balancer, 2 * PATIENCE)
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    resumed = collapsing()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    feed_noise(resumed, 2 * PATIENCE, seed=1)
    balancer.reset()
    with pytest.warns(TaskCollapseWarning):
        feed_noise(balancer, 2 * PATIENCE)


def test_a_state_saved_before_there_was_a_guard_loads():
    balancer = collapsing()
    state = balancer.state_dict()
    state["_extra_state"] = {"version": 1, "num_calls": 0, "param_numels": None}
    with pytest.warns(TaskCollapseWarning):
        feed_noise(balancer, 2 * PATIENCE)
    balancer.load_state_dict(state)
    with pytest.warns(TaskCollapseWarning):
        feed_noise(balancer, 2 * PATIENCE)


def test_a_warning_turned_into_an_error_leaves_the_step_whole():
    strict, lenient = collapsing(), collapsing()
    with pytest.raises(TaskCollapseWarning):
        feed_noise(strict, 10 * PATIENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        feed_noise(lenient, strict.num_calls)
    assert_equal_bits(list(strict.state_tensors().values()), list(lenient.state_tensors().values()))


def test_a_copied_balancer_has_a_guard_of_its_own():
    balancer = collapsing()
    feed_noise(balancer, 10)
    twin = copy.deepcopy(balancer)
    with pytest.warns(TaskCollapseWarning):
        feed_noise(twin, 2 * PATIENCE)
    with pytest.warns(TaskCollapseWarning):
        feed_noise(balancer, 2 * PATIENCE)


def test_on_a_gpu_nothing_waits_and_the_warning_still_comes():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    guard = CollapseGuard()
    weights, risks = COLLAPSED.cuda(), SIMILAR.cuda()
    with never_waiting_for_the_gpu():
        guard.look(CALLS_PER_LOOK, weights, risks)
        assert copy.deepcopy(guard)._copy_under_way is None
        with pytest.warns(TaskCollapseWarning):
            for look in range(2, 2 * LOOKS_REMEMBERED):
                while not guard._copy_under_way.is_done():  # asks, and waits for nothing
                    pass
                guard.look(look * CALLS_PER_LOOK, weights, risks)
