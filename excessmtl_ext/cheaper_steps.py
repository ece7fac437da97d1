"""Steps of ExcessMTL that cost less than one pass through the encoder per task.

Each estimates the risks from less than all gradients of all tasks, moves the weights with the same
equations as ever, and runs one ordinary pass with them. What is estimated from, and what that costs:

- a *subset* of the shared parameters: a pass per task that ends where the subset begins;
- the *features*: the gradients that the heads' passes leave at what the encoder returned;
- *rotation*: the whole gradient of some tasks, the others keep their latest risk.

Rotation may be combined with a subset, and ``update_every`` thins out any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excessmtl_ext import functional, gradients
from excessmtl_ext.arguments import checked_parameters
from excessmtl_ext.features import Cut
from excessmtl_ext.gradients import Root

if TYPE_CHECKING:
    from excessmtl_ext.excess_mtl import ExcessMTL


def checked_subset(chosen: Iterable[Tensor], shared: Sequence[Tensor] | None) -> list[Tensor]:
    """The parameters that risks are estimated from, in the order given; raises unless all are shared ones."""
    subset = checked_parameters(chosen, "estimate_from")
    known = {id(parameter) for parameter in shared or ()}
    for index, parameter in enumerate(subset):
        if id(parameter) not in known:
            raise ValueError(
                f"Expected `estimate_from[{index}]` to be one of the shared parameters, but it is none of them. Take "
                "some of those that are given to the balancer, such as model.encoder[-1].parameters()."
            )
    return subset


def check_supported(balancer: ExcessMTL) -> None:
    """Raises unless a balancer that looks at fewer gradients can do its steps; tells streaming that it cannot."""
    if balancer.shared_parameters is None:
        raise ValueError(
            "Expected `shared_parameters` with `estimate_from` or `tasks_per_step`: they decide which backward passes "
            "run. Without them, give update_weights() the gradients that you want risks estimated from."
        )
    if balancer._rotation is not None and balancer._estimate_kind == "features":
        raise ValueError(
            "Expected no `tasks_per_step` with estimate_from='features': one pass gives the features' gradients of all "
            "tasks already."
        )
    if balancer._data_parallel is not None:
        raise NotImplementedError(
            "Expected no `process_group` with `estimate_from` or `tasks_per_step`: several ranks exchange the whole "
            "gradient of every task. Use update_every, which works with ranks."
        )
    if balancer.batched is not False:
        raise ValueError(
            f"Expected batched=False with `estimate_from` or `tasks_per_step`, but got {balancer.batched!r}: their "
            "steps have no encoder passes of several tasks that could be one."
        )
    balancer.can_stream = False
    balancer.cannot_stream_because = (
        "`estimate_from` and `tasks_per_step` are there to save the passes it runs"
    )


class TaskRotation:
    """Whose turn it is, where a step estimates the risk of some tasks only.

    A round is over when every task has had its turn; then the weights move. A task that is absent
    from the batch in its turn gets it later in the round; if all that are left are absent, the
    round ends without them.

    Args:
        num_tasks: T.
        tasks_per_step: Turns in a step, fewer than T.
    """

    def __init__(self, num_tasks: int, tasks_per_step: int) -> None:
        self.num_tasks = num_tasks
        self.tasks_per_step = tasks_per_step
        self.waiting = list(range(num_tasks))

    @property
    def served(self) -> list[int]:
        """The tasks that have had their turn in this round."""
        return [task for task in range(self.num_tasks) if task not in self.waiting]

    def start_round(self) -> None:
        """Puts every task in line again."""
        self.waiting = list(range(self.num_tasks))

    def take_turns(self, present: Sequence[int]) -> list[int]:
        """The tasks of this step, taken out of the line; none if all that wait are absent."""
        turn = [task for task in self.waiting if task in present][: self.tasks_per_step]
        self.waiting = [task for task in self.waiting if task not in turn]
        return turn


def step_from_subset(
    balancer: ExcessMTL,
    roots: Sequence[Root | None],
    tasks: Sequence[int],
    scale: Tensor | None,
    features: Sequence[Tensor] | None,
) -> None:
    """Risks from the gradients of some shared parameters, then one pass of the weighted loss."""
    subset = balancer._estimate_parameters
    rows: list[list[Tensor | None]] = [[] for _ in roots]
    for task in _turns(balancer, tasks):
        root = roots[task]
        assert root is not None
        rows[task] = gradients.capture_grads(
            root, gradients.start_of(root, scale), subset, retain_graph=True
        )
        gradients.check_reached(rows[task], task)
    with torch.no_grad():
        _estimate(balancer, rows, scale)
    balancer._weighted_pass(roots, balancer._guarded_weights(), scale, features)


def step_in_rotation(
    balancer: ExcessMTL,
    roots: Sequence[Root | None],
    tasks: Sequence[int],
    scale: Tensor | None,
    features: Sequence[Tensor] | None,
) -> None:
    """The risks of the tasks whose turn it is from their whole gradients, then one pass for all other tasks."""
    shared = balancer._bound_parameters()
    turn = _turns(balancer, tasks)
    others = [None if task in turn else root for task, root in enumerate(roots)]
    mine = [root if task in turn else None for task, root in enumerate(roots)]
    weighted = balancer.head_weighting == "task_weights"
    heads = gradients.HeadGrads(gradients.head_leaves(mine, shared)) if weighted else None
    with gradients.set_aside_grads([*shared, *(heads.all_parameters() if heads else ())]):
        rows = gradients.backward_per_task(
            mine,
            shared,
            scale=scale,
            on_task=heads.take if heads else None,
            retain_graph=any(root is not None for root in others),
        )
    with torch.no_grad():
        _estimate(balancer, rows, scale)
        weights = balancer._guarded_weights()
        for task in turn:
            for parameter, grad in zip(shared, rows[task], strict=True):
                if grad is not None:
                    grad = grad.mul_(weights[task].to(grad.dtype))
                    gradients.add_grads([parameter], [parameter.grad], [grad])
        if heads is not None:
            heads.add(weights)
    balancer._weighted_pass(others, balancer._guarded_weights(), scale, features)


def step_from_features(
    balancer: ExcessMTL,
    roots: Sequence[Root | None],
    tasks: Sequence[int],
    scale: Tensor | None,
    features: Sequence[Tensor] | None,
) -> None:
    """Risks from the gradients of the features, which the heads' passes give, then one pass of the encoder."""
    cut = _cut_at(balancer, roots, features)
    feature_grads, head_grads = cut.walk_heads(roots, gradients.starts_of(roots, scale))
    with torch.no_grad():
        rows = _adapter_grads(cut, feature_grads, balancer.feature_dim)
        _estimate(balancer, rows, scale)
        weights = balancer._guarded_weights()
    cut.walk_encoder_weighted(feature_grads, weights)
    if balancer.head_weighting == "none":
        cut.deposit_heads(head_grads)
        return
    heads = gradients.HeadGrads(cut.heads)
    heads.grads = {task: grads for task, grads in enumerate(head_grads) if grads}
    heads.add(weights)


def _cut_at(
    balancer: ExcessMTL, roots: Sequence[Root | None], features: Sequence[Tensor] | None
) -> Cut:
    if features is None:
        raise ValueError(
            "Expected `features` with estimate_from='features': risks are estimated from their gradients. Call "
            "backward(losses, features=z) with what the encoder returned."
        )
    dim = balancer.feature_dim
    for index, z in enumerate(features):
        if not -z.dim() <= dim < z.dim() or z.dim() < 2:
            raise ValueError(
                f"Expected `features[{index}]` of shape [samples, ..., channels, ...] with the channels in dimension "
                f"{dim} (`feature_dim`), but got {list(z.shape)}."
            )
    cut = Cut(roots, features, balancer._bound_parameters())
    if cut.obstacle is not None:
        raise ValueError(
            f"Expected `features` where the passes can be cut, but {cut.obstacle}. Mend that, or estimate risks from "
            "parameters."
        )
    return cut


def _adapter_grads(
    cut: Cut, feature_grads: Sequence[Sequence[Tensor | None]], dim: int
) -> list[list[Tensor | None]]:
    """T rows of a gradient [C, C] per feature: with respect to A of a linear adapter z -> A z, at A = I."""
    samples = [_rows_of_channels(z, dim) for z in cut.features]
    rows: list[list[Tensor | None]] = []
    for reached, grads in zip(cut.reached, feature_grads, strict=True):
        row: list[Tensor | None] = [None] * len(samples)
        for index, grad in zip(reached, grads, strict=True):
            if grad is not None:
                row[index] = _rows_of_channels(grad, dim).T @ samples[index]
        rows.append(row if reached else [])
    return rows


def _rows_of_channels(tensor: Tensor, dim: int) -> Tensor:
    """[samples * positions, channels], float32 at least: a sum over samples is no place for bfloat16."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.movedim(dim, -1).flatten(0, -2).to(wide)


def _turns(balancer: ExcessMTL, tasks: Sequence[int]) -> Sequence[int]:
    """The tasks whose gradients this step looks at; ends a round that only absent tasks keep open."""
    rotation = balancer._rotation
    if rotation is None:
        return tasks
    turn = rotation.take_turns(tasks)
    if not turn:
        with torch.no_grad():
            balancer.found_nonfinite.zero_()
            _end_round(balancer)
        turn = rotation.take_turns(tasks)
    return turn


def _estimate(
    balancer: ExcessMTL, rows: Sequence[Sequence[Tensor | None]], scale: Tensor | None
) -> None:
    """Risks from the given gradients, one row per task, empty where there is none; moves the weights if it is time.

    Raises:
        FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
    """
    flat, tasks = balancer._flat_task_grads(rows)
    rotation = balancer._rotation
    if rotation is None:
        balancer._record_gradients(flat, range(balancer.num_tasks), scale)
        balancer._call_op(balancer._update_and_combine, flat, [], None, tasks, scale, False)
    else:
        balancer.found_nonfinite.zero_()
        num_tensors = len(flat) // balancer.num_tasks
        for task in tasks:
            grads = flat[task * num_tensors : (task + 1) * num_tensors]
            balancer._record_gradients(grads, [task], scale)
            balancer._call_op(balancer._refresh_risk, task, grads, scale)
        if rotation.waiting:
            balancer.num_skipped_steps += balancer.found_nonfinite.any()
        else:
            _end_round(balancer)
    balancer._raise_if_nonfinite()


def _end_round(balancer: ExcessMTL) -> None:
    """Moves the weights of the tasks that had their turn (Eq. 9); not if this step's gradients are not finite."""
    rotation = balancer._rotation
    assert rotation is not None
    functional.update_task_weights_(rotation.served, balancer.step_state, balancer.step_options)
    rotation.start_round()
