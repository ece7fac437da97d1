"""What PyTorch is told of the ops: schema, fake kernels, autograd, and their place in a compiled graph."""

from __future__ import annotations

import pytest
import torch
from _asserts import assert_equal_bits
from test_fused_step import sample_args

from excessmtl_ext import _extension, op_calls
from excessmtl_ext import functional as F
from excessmtl_ext.functional import MoveOptions, StepState, init_move_state
from excessmtl_ext.op_arguments import op_arguments


@pytest.mark.parametrize(
    "moves", [MoveOptions(), MoveOptions(0.7, True, True)], ids=["plain", "moves"]
)
@pytest.mark.parametrize("name", _extension.OP_NAMES)
def test_op_passes_opcheck(name, moves, device):
    """Schema, fake kernel, autograd registration, and the op under torch.compile with dynamic shapes."""
    layout, options, state, grads = sample_args(device)
    has_moves = not moves.is_plain or name == "commit_step_"
    per_tensor = torch.full((2, 2), 0.5, dtype=torch.float64, device=device)
    given = {}
    if has_moves:
        given = {"square_sums": per_tensor, "risk_share": torch.zeros_like(state.excess_risk)}
    if has_moves and name == "combine_":
        given["task_weights"] = per_tensor
    args, kwargs = op_arguments(
        name,
        device,
        layout,
        state,
        options,
        init_move_state(2, 2, device=device) if has_moves else None,
        moves,
        **given,
        moves_weights=True,
        task_grads=grads[:2] if name == "fold_" else grads,
        outputs=[torch.zeros(40, device=device), torch.zeros(9, device=device)],
        tasks=[0, 1],
        grad_scale=None,
        excess_risk_sum=torch.ones_like(state.excess_risk),
        accumulate=True,
        first_task=0,
        log_weight=torch.zeros((), dtype=torch.float64, device=device),
        running_sum=torch.zeros(layout.padded_numel, device=device),
        running_log_max=torch.zeros((), dtype=torch.float64, device=device),
    )
    op, sized = getattr(torch.ops.excessmtl_ext, name).default, op_calls.WITH_SIZES[name]
    torch.library.opcheck(op, args, kwargs)
    names = [each.name for each in op._schema.arguments]
    assert (sized is None) == ("param_numels" not in names)
    if sized is not None:
        place = names.index("param_numels")
        args = (*args[:place], list(layout.numels), *args[place + 1 :])
        torch.library.opcheck(sized, args, kwargs)


@pytest.mark.parametrize("by_sizes", [False, True], ids=["tensor", "sizes"])
def test_a_graph_holds_sizes_where_a_tensor_on_the_cpu_would_split_it(by_sizes, monkeypatch):
    monkeypatch.setattr(op_calls, "SIZES_IN_GRAPHS_ON", frozenset({"cpu"} if by_sizes else ()))
    layout, options, eager, grads = sample_args("cpu")
    traced = StepState(*[tensor.clone() for tensor in eager])
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    F.fused_step_(grads, layout, eager, options)
    torch.compile(F.fused_step_, backend=kept, fullgraph=True)(grads, layout, traced, options)
    assert_equal_bits(traced, eager)
    (call,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert call.target == (
        torch.ops.excessmtl_ext.fused_step_.sizes
        if by_sizes
        else torch.ops.excessmtl_ext.fused_step_.default
    )
    assert (call.args[1] == list(layout.numels)) == by_sizes


def test_compiled_step_has_no_graph_break_and_equals_eager(device):
    layout, options, eager, grads = sample_args(device)
    compiled = StepState(*[tensor.clone() for tensor in eager])
    outputs = [[torch.zeros(40, device=device), torch.zeros(9, device=device)] for _ in range(2)]

    def step(grads, state, outputs):
        F.fused_step_([grad * 2 for grad in grads], layout, state, options)
        F.combine_(grads, outputs, layout, state, options)
        F.fused_step_combine_(grads, outputs, layout, state, options, accumulate=True)
        return state.task_weights * 2

    expected = step(grads, eager, outputs[0])
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(grads, compiled, outputs[1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_equal_bits(list(compiled), list(eager))
    assert_equal_bits(outputs[1], outputs[0])
