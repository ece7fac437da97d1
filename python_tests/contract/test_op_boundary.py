"""The ops under hostile arguments: an exception every time, nothing written, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import _hostile_arguments
import pytest
import torch
from _asserts import assert_equal_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from excessmtl_ext import _extension
from excessmtl_ext import functional as F
from excessmtl_ext.functional import ParamLayout, StepOptions, init_state
from excessmtl_ext.op_arguments import op_arguments

pytestmark = pytest.mark.skipif(
    not _extension.ops_available, reason=f"no compiled ops: {_extension.unavailable_reason}"
)

NUMELS = [40, 9]


def make_step(num_tasks=2):
    layout, options = ParamLayout(NUMELS), StepOptions(gradient_momentum=0.9)
    state = init_state(num_tasks, layout, has_momentum=True)
    grads = [torch.randn(n) for _ in range(num_tasks) for n in NUMELS]
    return layout, options, state, grads, [torch.zeros(n) for n in NUMELS]


def test_every_op_answers_hostile_arguments_with_an_exception(tmp_path):
    """1,600 calls with one to three faults each, in a process whose crash would fail this test."""
    script = Path(_hostile_arguments.__file__)
    result = subprocess.run(
        [sys.executable, str(script), "--examples", "1600", "--seed", "1"],
        cwd=tmp_path, env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert result.stdout == "1600 calls, 1600 exceptions\n"


def test_the_hostile_calls_notice_an_op_that_lets_one_pass_and_one_that_writes_first():
    def arguments():
        return _hostile_arguments.sound_arguments(_hostile_arguments.random.Random(0))

    call = _hostile_arguments.Call(torch.ops.excessmtl_ext.fused_step_.default, arguments())
    assert _hostile_arguments.check(call) == "no exception"

    class WritesThenRaises:
        _schema = torch.ops.excessmtl_ext.fused_step_.default._schema

        def __call__(self, *args, **kwargs):
            args[4].add_(1.0)
            raise ValueError

    call = _hostile_arguments.Call(WritesThenRaises(), arguments())
    assert _hostile_arguments.check(call) == "wrote ['sq_grad_sum'] before it raised"


@pytest.mark.parametrize("which", ["grad", "strided grad", "output", "sq_grad_sum", "grad_scale"])
def test_storage_that_was_taken_away_raises_and_changes_nothing(which):
    """FSDP frees a parameter's storage with resize_(0); the tensor keeps its sizes."""
    layout, options, state, grads, outputs = make_step()
    scale = torch.ones(())
    if which == "strided grad":
        grads[0] = torch.randn(80)[::2]
    victim = {
        "grad": grads[0], "strided grad": grads[0], "output": outputs[0],
        "sq_grad_sum": state.sq_grad_sum, "grad_scale": scale,
    }[which]  # fmt: skip
    before = [tensor.clone() for tensor in state]
    victim.untyped_storage().resize_(0)
    name = which.replace("strided ", "").replace("output", "outputs")
    name = {"grad": "task_grads"}.get(name, name)
    with pytest.raises(RuntimeError, match=f"`{name}` to lie within its storage, but that has 0"):
        F.fused_step_combine_(grads, outputs, layout, state, options, scale)
    if which != "sq_grad_sum":
        assert_equal_bits(list(state), before)


def test_shared_memory_is_refused_by_name_and_an_output_may_be_its_own_gradient():
    layout, options, state, grads, outputs = make_step()
    before = [tensor.clone() for tensor in state]

    def raises(message, *, grads=grads, outputs=outputs, state=state):
        with pytest.raises(RuntimeError, match=f"Expected {message} not to share memory"):
            F.fused_step_combine_(grads, outputs, layout, state, options)
        assert_equal_bits(list(state)[:2], before[:2])

    whole = torch.zeros(49)
    raises("`outputs` 0 and `outputs` 1", outputs=[whole[:40], whole[31:40]])
    raises(
        "`task_grads` 1 and `outputs` 0",
        grads=[grads[0], whole[:9], *grads[2:]],
        outputs=[whole[:40], outputs[1]],
    )
    raises("`task_grads` 0 and `sq_grad_sum`", grads=[state.sq_grad_sum[0, :40], *grads[1:]])
    raises("`sq_grad_sum` and `grad_mean`", state=state._replace(grad_mean=state.sq_grad_sum))
    raises("`excess_risk` and `task_weights`", state=state._replace(task_weights=state.excess_risk))
    # Half a gradient of the same parameter is no gradient of it.
    raises("`task_grads` 0 and `outputs` 0", grads=[torch.as_strided(whole, (40,), (1,), 4), *grads[1:]],
           outputs=[whole[:40], outputs[1]])  # fmt: skip
    F.fused_step_combine_(grads, [grads[2], grads[1]], layout, state, options)
    assert int(state.num_steps) == 1


def test_a_meta_tensor_among_others_is_an_error_and_all_on_meta_does_nothing():
    layout, options, state, grads, outputs = make_step()
    with pytest.raises(
        RuntimeError, match="one device, but got `task_grads` on meta, `outputs` on cpu"
    ):
        F.fused_step_combine_([g.to("meta") for g in grads], outputs, layout, state, options)
    assert int(state.num_steps) == 0
    on_meta = type(state)(*[tensor.to("meta") for tensor in state])
    args, kwargs = op_arguments(
        "fused_step_", torch.device("meta"), layout, on_meta, options,
        task_grads=[g.to("meta") for g in grads], grad_scale=None,
    )  # fmt: skip
    torch.ops.excessmtl_ext.fused_step_(*args, **kwargs)


@given(kinds=st.lists(st.sampled_from(["strided", "negative", "zeros", "with_grad", "plain", "offset"]),
                      min_size=4, max_size=4))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_gradients_of_any_layout_give_what_plain_copies_give(kinds):
    layout, options, state, grads, outputs = make_step()
    as_kind = {
        "plain": lambda g: g,
        "strided": lambda g: torch.stack([g, g], dim=1)[:, 0],
        "negative": lambda g: torch._neg_view(-g),
        "zeros": lambda g: torch._efficientzerotensor(g.numel()),
        "with_grad": lambda g: g.clone().requires_grad_(),
        "offset": lambda g: torch.cat([torch.ones(3), g])[3:],
    }
    unusual = [as_kind[kind](grad) for kind, grad in zip(kinds, grads, strict=True)]
    plain = [torch.zeros_like(g) if k == "zeros" else g for k, g in zip(kinds, grads, strict=True)]
    expected, expected_outputs = (
        type(state)(*[tensor.clone() for tensor in state]),
        [tensor.clone() for tensor in outputs],
    )
    F.fused_step_combine_(unusual, outputs, layout, state, options)
    F.fused_step_combine_(plain, expected_outputs, layout, expected, options)
    assert_equal_bits([*state, *outputs], [*expected, *expected_outputs])


def test_tensors_of_state_that_require_grad_are_written_as_under_no_grad():
    layout, options, state, grads, outputs = make_step()
    state.sq_grad_sum.requires_grad_()
    F.fused_step_combine_(grads, outputs, layout, state, options)
    assert state.sq_grad_sum.is_leaf
    assert state.sq_grad_sum[0, 0].item() == grads[0][0].square().item()
