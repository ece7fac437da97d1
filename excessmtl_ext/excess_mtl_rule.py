"""The rule of ExcessMTL: how its weights move and how gradients are combined, for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from excessmtl_ext import bounded_moves, functional, gradient_sizes
from excessmtl_ext.excess_mtl_state import ExcessMTLState
from excessmtl_ext.state import (
    MAX_LOG_STEP,
    Fisher,
    MoveOptions,
    MoveState,
    ParamLayout,
    StepOptions,
    StepState,
)
from excessmtl_ext.step import Step, StreamedWeight, Targets

_COUNTS = ("num_steps", "num_skipped_steps")


class ExcessMTLRule(ExcessMTLState):
    """What the engines ask of :class:`excessmtl_ext.ExcessMTL`."""

    requires = frozenset({"task_grads"})
    follows_order = True

    max_log_ratio: float
    fisher: Fisher
    eps: float
    num_warmup_steps: int
    relative: bool
    rounding_seed: int

    lone_tasks: frozenset[int] = frozenset()
    """Tasks that had a batch of their own since Eq. 9 last moved the weights by the risks of such batches."""

    _new_shares: Tensor | None = None
    """[T], of the tasks that a step under way has taken in."""

    @property
    def step_options(self) -> StepOptions:
        """The choices as the stateless layer takes them."""
        return StepOptions(
            fisher=self.fisher,
            eps=self.eps,
            gradient_momentum=self.gradient_momentum,
            robust_step_size=self.robust_step_size or 1.0,  # not read by bounded moves
            num_warmup_steps=self.num_warmup_steps,
            relative=self.relative,
            min_weight=0.0 if isinstance(self.min_weight, tuple) else self.min_weight,
            weight_total=self.weight_total,
            rounding_seed=self.rounding_seed,
        )

    @property
    def move_options(self) -> MoveOptions:
        """The choices besides, as the stateless layer takes them."""
        return MoveOptions(
            self.max_log_ratio if self.robust_step_size is None else None,
            self.combination != "sum",
            isinstance(self.min_weight, tuple),
        )

    @property
    def move_state(self) -> MoveState:
        """The state besides: the balancer's own tensors, not copies."""
        own = self.__dict__
        return MoveState(*[own[name] for name in MoveState._fields])

    @property
    def step_state(self) -> StepState:
        """The state as the stateless layer takes it: the balancer's own tensors, not copies."""
        own = self.__dict__
        return StepState(*[own[name] for name in StepState._fields])

    def ready_state(self, step: Step) -> tuple[StepState, StepOptions]:
        """Returns the state and the options for the gradients of ``step``; the first ones size the state."""
        grads = step.task_grads
        if step.order is not self.order:
            self.follow(step.order)
        first = next((grad for grad in grads.tensors if grad.numel() > 0), self.task_weights)
        sums = self.sq_grad_sum
        if (
            sums.shape[1] == 0
            or sums.device != first.device
            or (first.dtype == torch.float64 != sums.dtype and first is not self.task_weights)
            or self.tensor_weights.shape[1] == 0
        ):
            self.size_state(grads, first.device)
        return self.step_state, self.step_options

    def update(self, step: Step) -> None:
        """Moves the weights by one step (He et al. 2024, Eqs. 6, 7 and 9, or :mod:`excessmtl_ext.bounded_moves`)."""
        state, options = self.ready_state(step)
        grads = step.task_grads
        functional.fused_step_(
            grads.tensors,
            grads.layout,
            state,
            options,
            step.grad_scale,
            move=None if self.has_plain_step else self.move_state,
            moves=self.move_options,
        )

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the weighted sum to ``targets``; NaN after a non-finite step."""
        grads = step.task_grads
        functional.combine_(
            grads.tensors,
            targets.outputs,
            grads.layout,
            self.step_state,
            self.step_options,
            step.grad_scale,
            accumulate=targets.accumulate,
            weights=self.sum_weights(),
        )

    def update_and_combine(self, step: Step, targets: Targets) -> None:
        """:meth:`update` and :meth:`combine`, in one op."""
        state, options = self.ready_state(step)
        grads = step.task_grads
        functional.fused_step_combine_(
            grads.tensors,
            targets.outputs,
            grads.layout,
            state,
            options,
            step.grad_scale,
            accumulate=targets.accumulate,
            move=None if self.has_plain_step else self.move_state,
            moves=self.move_options,
        )

    @property
    def has_plain_step(self) -> bool:
        """Whether the ops do all there is to do."""
        return self.combination == "sum" and self.has_plain_weights

    @property
    def has_plain_weights(self) -> bool:
        """Whether the weights are those of Eq. 9, with one floor or none."""
        return self.robust_step_size is not None and not isinstance(self.min_weight, tuple)

    def sum_weights(self) -> Tensor:
        """Factors [T] or [T, L] of the task gradients in the sum of the latest step."""
        return self.task_weights if self.combination == "sum" else self.tensor_weights

    def commit(self, risk_sums: Tensor, square_sums: Tensor | None, tasks: Sequence[int]) -> None:
        """Moves the weights by the sums of a step, of all ranks; S and m have taken it in."""
        state, options, layout = self.step_state, self.step_options, self.layout
        assert layout is not None
        state.found_nonfinite.zero_()
        if square_sums is None:
            functional.update_task_risks_(risk_sums, tasks, layout, state, options)
            functional.update_task_weights_(tasks, state, options)
            return
        functional.commit_step_(
            risk_sums,
            square_sums,
            tasks,
            layout,
            state,
            options,
            move=self.move_state,
            moves=self.move_options,
        )

    def pass_weights(self) -> Tensor:
        """Factors [T] of the task gradients in a step of one pass for all tasks."""
        ratios = self._pass_ratios()
        return self.task_weights if ratios is None else self.task_weights * ratios

    def _pass_ratios(self) -> Tensor | None:
        """Returns ratios [T], or None while there is nothing to bring to one size."""
        has_sizes = self.combination != "sum" and self.tensor_mean_square.shape[1] > 0
        if not has_sizes or self.layout is None:
            return None
        return gradient_sizes.pass_ratios(
            self.tensor_mean_square, self.num_tensor_steps, self.layout
        )

    def take_task(self, step: Step) -> Tensor | None:
        """Takes in the gradients of one task: everything but the weights.

        Returns:
            [L], the mean squares of the gradients; None where nobody needs them.
        """
        (task,) = step.tasks
        state, options = self.ready_state(step)
        grads = step.task_grads
        row, sums = slice(task, task + 1), torch.zeros_like(state.excess_risk)
        rows = state.sq_grad_sum[row], state.grad_mean[row]
        squares = None
        if self.robust_step_size is None or self.combination != "sum":
            squares = self.tensor_mean_square.new_zeros(1, len(grads.layout.numels))
        of_task: dict[str, Any] = {"state": state, "first_task": task}
        functional.accumulate_excess_risk_(
            grads.tensors,
            grads.layout,
            *rows,
            sums[row],
            state.ticket,
            options,
            step.grad_scale,
            square_sums=squares,
            **of_task,
        )
        if squares is None:
            functional.update_task_risks_(sums, [task], grads.layout, state, options)
        else:
            self._take_in(task, sums, squares, grads.layout, state, options)
        return None if squares is None else gradient_sizes.mean_squares(squares, grads.layout)[0]

    def _take_in(
        self,
        task: int,
        sums: Tensor,
        squares: Tensor,
        layout: ParamLayout,
        state: StepState,
        options: StepOptions,
    ) -> None:
        if self._new_shares is None:
            self._new_shares = torch.zeros_like(sums)
        functional.commit_step_(
            sums,
            squares,
            [task],
            layout,
            state,
            options,
            move=self.move_state,
            moves=self.move_options,
            risk_share=self._new_shares,
            moves_weights=False,
        )

    def tasks_without_size(self, tasks: Sequence[int]) -> list[int]:
        """Returns those of ``tasks`` that are to be brought to one size and have none yet; waits for the device."""
        if self.combination == "sum":
            return []
        has_size = (self.num_tensor_steps > 0).any(1).tolist()
        return [task for task in tasks if not has_size[task]]

    def take_size(self, step: Step) -> None:
        """Takes in the size of one task's gradients and nothing else."""
        (task,) = step.tasks
        self.ready_state(step)
        grads, row = step.task_grads, slice(task, task + 1)
        squares = gradient_sizes.exact_sums_of_squares(
            grads.tensors, len(grads.layout.numels), step.grad_scale
        )
        gradient_sizes.update_sizes_(
            self.tensor_mean_square[row],
            self.num_tensor_steps[row],
            gradient_sizes.mean_squares(squares, grads.layout),
            squares.isfinite().all(),
        )

    def take_turns(self, step: Step, turns: Sequence[Step], served: Sequence[int] | None) -> Tensor:
        """Takes in the gradients of some tasks; once all of a round are in, moves the weights.

        Args:
            step: Its gradients are those of all T tasks, without elements for the others.
            turns: A step per task taken in.
            served: The tasks of the round that ends here, or None.

        Returns:
            Factors [T] of the task gradients in a step of one pass; NaN where a gradient is not finite.
        """
        self.ready_state(step)
        self.found_nonfinite.zero_()
        self._new_shares = None  # of a step that was broken off
        relative_risk = self.relative_excess_risk.clone()
        for each in turns:
            self.take_task(each)
        has_nonfinite = self.found_nonfinite.any()
        if self.robust_step_size is None:  # theirs are of the end of a round, E / B is Eq. 9's
            self.relative_excess_risk.copy_(relative_risk)
        if served is None:
            self.num_skipped_steps += has_nonfinite
        else:
            self.move_weights(served)
        self.add_new_shares(True)  # of the tasks whose gradients were finite
        return torch.where(has_nonfinite, float("nan"), self.pass_weights())

    def move_weights(self, tasks: Sequence[int]) -> None:
        """Moves the weights once the tasks of a step, or of a round, have been taken in."""
        self._move(tasks, self.step_state)

    def _move(self, tasks: Sequence[int], state: StepState) -> None:
        options = self.step_options
        if self.has_plain_weights or self.layout is None:
            functional.update_task_weights_(tasks, state, options)
            return
        functional.commit_step_(
            None,
            None,
            tasks,
            self.layout,
            state,
            options,
            move=self.move_state,
            moves=self.move_options,
        )

    def end_lone_step(self, step: Step, task: int) -> None:
        """Moves the weights by Eq. 9, with the latest risks, once every task has had a batch of its own.

        Eq. 9 compares the tasks of a step, so one by itself moves nothing. Bounded moves compare sums over all
        steps, and a rotation has rounds already.
        """
        flags = self.found_nonfinite
        has_rounds = self.robust_step_size is None or self._rotation is not None
        if has_rounds or not step.moves_weights:
            return
        if flags.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # the host decides, and replays do not come by
        if not flags.is_cuda and bool(flags.any()):
            return
        self.lone_tasks |= {task}
        if len(self.lone_tasks) == self.num_tasks:
            self.lone_tasks = frozenset()
            state = self.step_state  # copies of the counts: it is no step of its own
            counts = {name: getattr(state, name).clone() for name in _COUNTS}
            self._move(range(self.num_tasks), state._replace(**counts))

    def add_new_shares(self, counts: Tensor | bool) -> None:
        """Adds the shares of the tasks taken in to their sums, if the step counts."""
        if self._new_shares is not None:
            self.risk_share_sum += self._new_shares * counts
        self._new_shares = None

    def stream_task(self, step: Step) -> StreamedWeight:
        """Takes in the gradients of one task; returns its new log-weight, not normalised."""
        (task,) = step.tasks
        if not step.moves_weights:
            self.ready_state(step)
            ratios = self._pass_ratios()
            scale = None if ratios is None else gradient_sizes.log_ratio(ratios[task])
            return StreamedWeight(self.log_task_weights[task].clone(), scale)
        squares = self.take_task(step)
        state, options = self.step_state, self.step_options
        scale = None
        if squares is not None and self.combination != "sum":
            size = gradient_sizes.sizes_now(self.tensor_mean_square[task], squares)
            scale = -0.5 * size.log()
        if self.robust_step_size is None:
            log_weights = bounded_moves.log_weights(
                state, self.move_state, options, self.max_log_ratio
            )
            return StreamedWeight(log_weights[task], scale)
        is_past_warmup = (state.num_steps >= self.num_warmup_steps).to(state.log_task_weights.dtype)
        log_step = self.robust_step_size * state.relative_excess_risk[task]
        moved = state.log_task_weights[task] + is_past_warmup * log_step.clamp(max=MAX_LOG_STEP)
        return StreamedWeight(moved, scale)

    def stream_finish(self, step: Step) -> Tensor | None:
        """Moves the weights once the risk of every task of the step is known; returns log-factors [L] of the sum."""
        if not step.moves_weights:
            return None
        self.move_weights(step.tasks)
        self.add_new_shares(~self.found_nonfinite.any())
        if self.combination == "sum":
            return None
        return 0.5 * gradient_sizes.largest_sizes(self.tensor_mean_square).log()
