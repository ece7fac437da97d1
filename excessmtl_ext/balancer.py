"""The contract every balancing method keeps: the same verbs, the same state handling, the same conventions.

A method owns no model and no optimizer. It says what it ``requires`` and computes weights;
everything else is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from excessmtl_ext import functional, given_gradients, gradients, saved_state, streaming
from excessmtl_ext.arguments import check_choice, check_count, checked_parameters
from excessmtl_ext.collapse import effective_num_tasks
from excessmtl_ext.features import Features, checked_features
from excessmtl_ext.functional import ParamLayout
from excessmtl_ext.given_gradients import GivenGrads
from excessmtl_ext.gradients import Losses, Root
from excessmtl_ext.heap_pin import LEAST_NUMEL, HeapPin
from excessmtl_ext.history import History, HistoryWriter
from excessmtl_ext.memory import MemoryReport, make_memory_report
from excessmtl_ext.passes import Batched, Passes
from excessmtl_ext.report import BalancerReport, make_report
from excessmtl_ext.saved_state import STATE_VERSION

if TYPE_CHECKING:
    from excessmtl_ext.distributed import DataParallel, NumSamples

WeightScale = Literal["simplex", "num_tasks"]
HeadWeighting = Literal["none", "task_weights"]
NonFinite = Literal["skip", "raise"]


class Balancer(nn.Module, ABC):
    """Base of all balancing methods.

    ``backward(losses)`` fills ``.grad`` of the shared parameters with the weighted sum of the task
    gradients and ``.grad`` of all others (heads) with the gradient of their own loss.
    ``balancer(losses)`` gives a scalar whose ``.backward()`` does the same. ``accumulate`` and
    ``finish`` do it task by task. Gradients are added to ``.grad``, as autograd does.

    Args:
        shared_parameters: What all tasks share, usually ``model.encoder.parameters()``. None for a
            balancer that is only given gradients (:meth:`update_weights`).
        num_tasks: T, between 1 and 512.
        weight_scale: What the weights sum to: ``"simplex"``: 1 (the paper), ``"num_tasks"``: T (the
            official code).
        head_weighting: ``"none"``: heads get the gradient of their own loss (the paper);
            ``"task_weights"``: times the task's weight (the official code).
        nonfinite: What a step with a NaN or infinite gradient does. ``"skip"``: it changes no
            state, is counted, and leaves NaN in the shared ``.grad``, so that a GradScaler skips
            its step too; without one, guard the optimizer with ``balancer.found_nonfinite.any()``.
            ``"raise"``: FloatingPointError, with ``.grad`` of the shared parameters as before the
            call. Costs one wait for the device per step.
        batched: Whether the encoder's T passes run as one vectorised pass in steps that are given
            their ``features``. ``"auto"``: as fast as measured in the first eight of them. Gradients
            are equal up to rounding; :attr:`backward_mode` says what was done and why.

    Raises:
        ValueError: an argument is out of range, or the parameters are empty, repeated or not
            leaves.
        TypeError: an argument has the wrong type.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """What the weights are computed from: ``"task_grads"``, ``"losses"``, both, or nothing."""

    _data_parallel: DataParallel | None = None
    """Takes the step over where several ranks share it; see :mod:`excessmtl_ext.distributed`."""

    can_stream: bool = True
    """Whether ``accumulate`` works: not where the weight of one task depends on the gradients of the others."""

    cannot_stream_because: str = (
        "the weight of one task depends on the gradients of the others, so all must live at once"
    )
    """What ``accumulate`` says where it does not work."""

    log_task_weights: Tensor
    task_weights: Tensor
    num_steps: Tensor
    num_skipped_steps: Tensor
    found_nonfinite: Tensor

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | None = None,
        *,
        num_tasks: int,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
    ) -> None:
        super().__init__()
        check_count("num_tasks", num_tasks, 1)
        if num_tasks > functional.MAX_TASKS:
            raise ValueError(
                f"Expected `num_tasks` <= {functional.MAX_TASKS}, but got {num_tasks}."
            )
        check_choice("weight_scale", weight_scale, ("simplex", "num_tasks"))
        check_choice("head_weighting", head_weighting, ("none", "task_weights"))
        check_choice("nonfinite", nonfinite, ("skip", "raise"))
        self.num_tasks = num_tasks
        self.weight_scale: WeightScale = weight_scale
        self.head_weighting: HeadWeighting = head_weighting
        self.nonfinite: NonFinite = nonfinite
        self.shared_parameters: list[Tensor] | None = None
        self._layout: ParamLayout | None = None
        self._stream: streaming.Stream | None = None
        self._passes = Passes(batched)
        self._heap_pin = HeapPin()
        self._num_calls = 0
        self._history: History | None = None
        if shared_parameters is not None:
            self.shared_parameters = checked_parameters(shared_parameters)
            self._layout = ParamLayout([parameter.numel() for parameter in self.shared_parameters])
        device = self.shared_parameters[0].device if self.shared_parameters else torch.device("cpu")
        device = torch.device("cpu") if device.type == "meta" else device
        self._register_state(self._initial_state(device))

    # ---- state

    @property
    def weight_total(self) -> float:
        """What the weights sum to."""
        return 1.0 if self.weight_scale == "simplex" else float(self.num_tasks)

    @property
    def effective_num_tasks(self) -> Tensor:
        """How many equally weighted tasks the weights amount to, 1 to T, as a tensor [] on their device (no sync).

        The squared sum of the weights over the sum of their squares (Kish 1965).
        """
        return effective_num_tasks(self.task_weights)

    @property
    def batched(self) -> Batched:
        """What was asked for: True, False or ``"auto"``."""
        return self._passes.batched

    @property
    def backward_mode(self) -> str:
        """How the latest step that needed task gradients ran the encoder's passes, and why."""
        return str(self._passes)

    @property
    def needs_features(self) -> bool:
        """Whether ``backward`` must be given ``features``."""
        return False

    def _initial_state(self, device: torch.device) -> dict[str, Tensor]:
        """Every state tensor before the first step, by name."""
        state = functional.init_state(
            self.num_tasks, ParamLayout([]), device=device, weight_total=self.weight_total
        )
        names = (
            "log_task_weights",
            "task_weights",
            "num_steps",
            "num_skipped_steps",
            "found_nonfinite",
        )
        return {name: getattr(state, name) for name in names}

    def _register_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            self.register_buffer(name, tensor)

    def reset(self) -> None:
        """Forgets everything: the state is as before the first step, also the sizes if no parameters were given."""
        self._stream = None
        self._passes.forget()
        self._heap_pin.release()
        self._num_calls = 0
        if self._history is not None:
            self._history.restart()
        if self.shared_parameters is None:
            self._layout = None
        for name, tensor in self._initial_state(self.task_weights.device).items():
            setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Balancer:
        # half() or bfloat16() on a model that holds the balancer must not round its state: only the
        # device follows.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` holds besides tensors: plain numbers, loadable with ``weights_only=True``."""
        return {
            "version": STATE_VERSION,
            "num_calls": self._num_calls,
            "param_numels": None if self._layout is None else list(self._layout.numels),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`get_extra_state` gave; called by ``load_state_dict`` after the checks."""
        self._num_calls = state["num_calls"]
        if self._layout is None and state["param_numels"] is not None:
            self._layout = ParamLayout(state["param_numels"])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._problem_with(state_dict, prefix)
        if problem is not None:  # nothing is copied then: the state stays whole
            error_msgs.append(problem)
            return
        for name, tensor in list(self._buffers.items()):
            saved = state_dict.get(prefix + name)
            if tensor is not None and saved is not None and tensor.shape != saved.shape:
                # A state whose size is known from the first step on: take the size and the type of
                # the saved one.
                self._buffers[name] = torch.empty_like(saved, device=tensor.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problem_with(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why ``state_dict`` cannot be loaded, or None."""
        return saved_state.problem_with(
            state_dict, prefix, self._buffers, self._layout, self._may_resize
        )

    def _may_resize(self, name: str, tensor: Tensor, saved: Tensor) -> bool:
        """Whether a buffer that is not yet sized may take the size of a saved one."""
        return False

    # ---- insight

    @property
    def history(self) -> History | None:
        """What :meth:`record_history` has begun, or None."""
        return self._history

    def record_history(
        self,
        *,
        every: int = 1,
        flush_every: int = 100,
        keep: int = 10_000,
        gradients: bool = False,
        task_names: Sequence[str] | None = None,
        writers: Iterable[HistoryWriter] = (),
    ) -> History:
        """Records weights, risks and skipped steps from now on, without changing any of them.

        A recorded step adds three small kernels and waits for nothing; a flush is one copy to the host. Close
        the history, or use it in a ``with`` statement, so that the last records are written. Not in ``state_dict``.

        Args:
            every: Record calls 1, 1 + every, 1 + 2 * every, ...
            flush_every: Records on the device between two flushes.
            keep: Latest records that stay in the host's memory, for ``history.records()`` and :meth:`report`.
            gradients: Also the norm of each task's gradient, its noise share and its cosine with the combined
                gradient, in recorded steps that compute task gradients. For the cost see
                :class:`excessmtl_ext.gradient_statistics.GradientStatistics`; a larger ``every``
                divides it. No cosine in streaming, where only one gradient lives at a time.
            task_names: T names for writers and report.
            writers: Such as :class:`excessmtl_ext.history.CSVWriter` and ``TensorBoardWriter``. With several
                processes, give writers to one.

        Raises:
            RuntimeError: a history is being recorded already.
            ValueError: an argument is out of range.
        """
        if self._history is not None and not self._history.is_closed:
            raise RuntimeError(
                "Expected no history under way, but one is being recorded. Call history.close() first."
            )
        if gradients and self._data_parallel is not None:
            raise NotImplementedError(
                "record_history(gradients=True) works in one process: with several ranks no rank holds the whole "
                "gradient of a task. Weights, risks and skipped steps are recorded with gradients=False."
            )
        self._history = History(
            self,
            every=every,
            flush_every=flush_every,
            keep=keep,
            gradients=gradients,
            task_names=task_names,
            writers=writers,
        )
        return self._history

    def report(self) -> BalancerReport:
        """How each task fares, to print: weight, risk, gradient, skips, and which task looks noisy or stuck.

        Gradient norm, noise share and cosine need ``record_history(gradients=True)``. Waits for the device.
        """
        return make_report(self)

    def memory_report(self, step: Callable[[], object] | None = None) -> MemoryReport:
        """What the balancer holds and what a step adds, in bytes by kind, and a measured peak; to print.

        Args:
            step: One training step, called once and measured: the most it added to what was there, activations and
                all. None: the peak of the process so far, by torch's allocator on CUDA, else of its resident set.

        Raises:
            ValueError: the balancer was made without parameters and has seen no gradient.
        """
        return make_memory_report(self, step)

    def _live_task_grads(self) -> tuple[float, str]:
        """The most gradients of all shared parameters that live at once in ``backward``, and what they are."""
        if "task_grads" in self.requires:
            return self.num_tasks, "one per task; `.grad` is one of them"
        return 1, "`.grad`"

    def _record_gradients(
        self, task_grads: Sequence[Tensor], tasks: Sequence[int], scale: Tensor | None
    ) -> None:
        """Shows the history the gradients of ``tasks`` before combining overwrites them."""
        if self._history is not None:
            numels = self._bound_layout().numels
            self._history.take_gradients(self, self._num_calls, task_grads, tasks, numels, scale)

    def _record_step(self, tasks: Sequence[int]) -> None:
        if self._history is not None:
            self._history.end_step(self, self._num_calls, tasks)

    # ---- what a method defines

    @abstractmethod
    def _update(
        self,
        task_grads: list[Tensor] | None,
        losses: Tensor | None,
        tasks: list[int],
        scale: Tensor | None,
    ) -> None:
        """Moves the weights by one step; ``task_grads``: T * L, empty where there is none; ``losses``: [T]."""

    def _stream_task(
        self, task: int, grads: list[Tensor], loss: Tensor, scale: Tensor | None
    ) -> Tensor:
        """Takes in one task of a streamed step; returns its new log-weight [], up to a constant common to all.

        Like :meth:`_stream_finish` not needed by a method with ``can_stream = False``.
        """
        raise NotImplementedError

    def _stream_finish(self, tasks: list[int], losses: dict[int, Tensor]) -> None:
        """Moves the weights once every task of a streamed step has been taken in."""
        raise NotImplementedError

    def _moves_weights(self) -> bool:
        """Whether this call moves the weights or only applies them."""
        return True

    def _head_weights(self) -> Tensor:
        """[T], what head gradients are multiplied by where they are weighted."""
        return self.task_weights

    def _has_uniform_weights(self) -> bool:
        """Whether all weights are known to be equal without looking at them."""
        return False

    def _combine(
        self,
        task_grads: list[Tensor],
        outputs: list[Tensor],
        scale: Tensor | None,
        *,
        accumulate: bool,
    ) -> None:
        """Writes the weighted sum to ``outputs``; after a non-finite step repairs the state and writes NaN."""
        functional.weighted_sum_(
            task_grads,
            outputs,
            self._bound_layout(),
            self.task_weights,
            found_nonfinite=self.found_nonfinite,
            accumulate=accumulate,
        )

    def _update_and_combine(
        self,
        task_grads: list[Tensor],
        outputs: list[Tensor],
        losses: Tensor | None,
        tasks: list[int],
        scale: Tensor | None,
        accumulate: bool,
    ) -> None:
        """``_update``, then ``_combine`` with the new weights; overridden where one op does both."""
        self._update(task_grads, losses, tasks, scale)
        self._combine(task_grads, outputs, scale, accumulate=accumulate)

    # ---- the verbs

    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        grad_scale: Tensor | float | None = None,
        num_samples: NumSamples | None = None,
    ) -> None:
        """One balanced step: weights from ``losses``, then gradients into ``.grad``.

        Args:
            losses: T scalar losses: a list, with None where a task has no labels in this batch, or
                one tensor [T].
            features: Everything that the heads take from the encoder, one tensor or several. Each
                head is then walked by itself and its graph freed before the encoder's passes, which
                ``batched`` may make one; steps that only apply weights need a single one, and no
                division. Same gradients. Several ranks do not need it.
            grad_scale: Loss scale, as from ``GradScaler.get_scale()``: all gradients come out
                multiplied by it, the weights are computed without it.
            num_samples: With several ranks, samples behind each loss of this one: one number, or T.
                None: as many on each rank. 0: the loss weighs nothing. One process needs none.

        Raises:
            ValueError: number, shape, device or graph of losses or features is not as expected.
                State and shared ``.grad`` are then as before.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
            RuntimeError: another rank has failed; state and ``.grad`` are as before.
        """
        with self._telling_ranks():
            roots = gradients.loss_roots(losses, self.num_tasks)
            gradients.check_device(roots, self._bound_parameters()[0].device)
            values = (
                gradients.loss_values(losses, self.task_weights)
                if "losses" in self.requires
                else None
            )
            scale = self._as_scale(grad_scale)
            cut_at = self._checked_features(features)
        self._run_step(roots, values, scale, num_samples, cut_at)

    def forward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        num_samples: NumSamples | None = None,
    ) -> Tensor:
        """The weighted loss as a scalar whose ``.backward()`` does what :meth:`backward` does.

        For loops that call ``backward`` themselves: Lightning, Accelerate, GradScaler (its scale is
        undone inside). Its value is the sum of the losses under the weights so far, of this rank's
        batch. Without ``.backward()`` nothing changes. ``features`` and ``num_samples`` as in
        :meth:`backward`.
        """
        with self._telling_ranks():
            roots = gradients.loss_roots(losses, self.num_tasks)
            gradients.check_device(roots, self._bound_parameters()[0].device)
            cut_at = self._checked_features(features)
        values = gradients.loss_values(losses, self.task_weights)
        total = (
            self.task_weights * values.nan_to_num(0.0)
            if None in roots
            else self.task_weights * values
        ).sum()
        first = (
            losses
            if isinstance(losses, Tensor)
            else next((loss for loss in losses if loss is not None), total)
        )
        anchor = torch.zeros((), device=total.device, requires_grad=True)
        return _BalancedLoss.apply(  # type: ignore[no-any-return]
            anchor, self, roots, values, num_samples, cut_at, total.to(first.dtype)
        )

    def update_weights(
        self,
        task_grads: Sequence[Sequence[Tensor | None]] | Tensor | None = None,
        losses: Sequence[Tensor] | Tensor | None = None,
        *,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Moves the weights from gradients or losses that the caller has, and touches no ``.grad``.

        Args:
            task_grads: T lists of L gradients (None where there is none; an empty list for an
                absent task), or one [T, P].
            losses: T values. What a method does not require may be left out.
            grad_scale: Factor that ``task_grads`` carry, to be undone.

        Returns:
            The new weights [T], float64.

        Raises:
            ValueError: what the method requires is missing, or does not fit.
        """
        scale = self._as_scale(grad_scale)
        missing = [
            name
            for name, given in (("task_grads", task_grads), ("losses", losses))
            if given is None
        ]
        for name in missing:
            if name in self.requires:
                raise ValueError(
                    f"Expected `{name}`: {type(self).__name__} computes its weights from them."
                )
        given = None
        tasks = list(range(self.num_tasks))
        if losses is not None and "losses" in self.requires:
            given = self._checked_losses(losses)
        flat = None
        if task_grads is not None and "task_grads" in self.requires:
            flat, tasks = self._flat_task_grads(task_grads)
        # Last, since the state follows the gradients.
        values = None if given is None else given.to(self.task_weights)
        if self._data_parallel is not None and flat is not None:
            tasks = self._data_parallel.update(self, flat, scale)  # type: ignore[arg-type]
        elif tasks and self._moves_weights():
            with torch.no_grad():
                if flat is None:
                    self._call_op(self._update, flat, values, tasks, scale)
                else:
                    self._record_gradients(flat, range(self.num_tasks), scale)
                    self._call_op(self._update_and_combine, flat, [], values, tasks, scale, False)
                self._raise_if_nonfinite()
        elif tasks:
            self.found_nonfinite.zero_()
        if not tasks:
            return self.task_weights
        self._num_calls += 1
        self._after_call()
        self._record_step(tasks)
        return self.task_weights

    def accumulate(
        self,
        task: int,
        loss: Tensor,
        *,
        retain_graph: bool = False,
        grad_scale: Tensor | float | None = None,
    ) -> None:
        """Streaming: takes in one task of a step; only one task's graph and gradient need to live at a time.

        ``finish`` ends the step. Equal to :meth:`backward` in real arithmetic, with two buffers of
        P elements instead of T. One difference: a task with a non-finite gradient undoes only its
        own state; the others keep this step's squares.

        Args:
            task: Index of the task, each at most once per step.
            loss: Its scalar loss.
            retain_graph: Keep the graph: needed when another task's loss shares it.
            grad_scale: Loss scale; the same for every task of a step.

        Raises:
            NotImplementedError: the method needs the gradients of all tasks at once.
        """
        streaming.check_task(self, task)
        gradients.check_loss(loss, "loss")
        gradients.check_device([loss], self._bound_parameters()[0].device)
        scale = self._as_scale(grad_scale)
        streaming.accumulate(self, task, loss, retain_graph=retain_graph, scale=scale)

    def finish(self) -> None:
        """Streaming: moves the weights and adds the weighted sum of the step's gradients to the shared ``.grad``.

        Raises:
            RuntimeError: no task was accumulated since the last step.
        """
        stream = self._stream
        if stream is None:
            raise RuntimeError(
                "Expected accumulate() before finish(): no task has been taken in since the last step."
            )
        self._stream = None
        with torch.no_grad():
            self._stream_finish(stream.tasks, stream.losses)
            self._raise_if_nonfinite()
            self._num_calls += 1
            streaming.combine(self, stream)
        self._after_call()
        self._record_step(stream.tasks)

    # ---- inside

    def _telling_ranks(self) -> AbstractContextManager[None]:
        """An error in the body is also raised on the ranks that wait for this one, if there are any."""
        if self._data_parallel is None:
            return nullcontext()
        return self._data_parallel.reporting(self)  # type: ignore[arg-type]

    def _run_step(
        self,
        roots: list[Root | None],
        values: Tensor | None,
        scale: Tensor | None,
        num_samples: NumSamples | None,
        features: list[Tensor] | None,
    ) -> None:
        if self._data_parallel is None:
            self._step(roots, values, scale, features)
        else:
            self._data_parallel.step(self, roots, num_samples, scale)  # type: ignore[arg-type]

    def _checked_losses(self, losses: Sequence[Tensor] | Tensor) -> Tensor:
        """[T], where and as they were given: on a GPU none is fetched."""
        if isinstance(losses, Tensor):
            values = losses.detach()
        elif len(losses) > 0 and all(
            isinstance(loss, Tensor) and loss.device == losses[0].device for loss in losses
        ):
            values = torch.stack([loss.detach().reshape(()) for loss in losses])
        else:
            values = torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
        if values.shape != (self.num_tasks,):
            raise ValueError(
                f"Expected `losses` of shape [{self.num_tasks}], but got {list(values.shape)}."
            )
        return values

    def _checked_features(self, features: Features | None) -> list[Tensor] | None:
        device = self._bound_parameters()[0].device
        return None if features is None else checked_features(features, device)

    def _step(
        self,
        roots: list[Root | None],
        values: Tensor | None,
        scale: Tensor | None,
        features: list[Tensor] | None = None,
    ) -> None:
        if self._stream is not None:
            raise RuntimeError("Expected finish() before another step: accumulate() has begun one.")
        tasks = [task for task, root in enumerate(roots) if root is not None]
        moves = self._moves_weights()
        if not tasks:
            return
        if moves and "task_grads" in self.requires:
            self._step_from_task_grads(roots, values, tasks, scale, features)
        else:
            with torch.no_grad():
                if moves:
                    self._update(None, values, tasks, scale)
                    self._raise_if_nonfinite()
                else:
                    self.found_nonfinite.zero_()  # the flags are those of the latest step
                looks_at_losses = "losses" in self.requires
                weights = self._guarded_weights() if looks_at_losses else self.task_weights
            self._weighted_pass(roots, weights, scale, features)
        self._num_calls += 1
        self._after_call()
        self._record_step(tasks)

    def _guarded_weights(self) -> Tensor:
        """[T], the weights; NaN after a step that does not count, so that whoever guards the optimizer sees it."""
        return torch.where(self.found_nonfinite.any(), float("nan"), self.task_weights)

    def _weighted_pass(
        self,
        roots: Sequence[Root | None],
        weights: Tensor,
        scale: Tensor | None,
        features: Sequence[Tensor] | None,
    ) -> None:
        """One pass of the weighted loss, into ``.grad`` of shared and head parameters."""
        self._passes.weighted_backward(
            roots,
            self._bound_parameters(),
            features,
            weights,
            scale=scale,
            weighted_heads=self.head_weighting == "task_weights",
            is_uniform=self._has_uniform_weights(),
        )

    def _step_from_task_grads(
        self,
        roots: list[Root | None],
        values: Tensor | None,
        tasks: list[int],
        scale: Tensor | None,
        features: list[Tensor] | None,
    ) -> None:
        shared = self._bound_parameters()
        task_grads, heads = self._passes.task_grads(
            roots, shared, features, scale, keep_heads=self.head_weighting == "task_weights"
        )
        with torch.no_grad():
            flat = gradients.flat_rows(task_grads)
            self._prepare(flat)
            self._record_gradients(flat, range(self.num_tasks), scale)
            if self.nonfinite == "raise":  # the flags are read before any .grad is written
                self._call_op(self._update, flat, values, tasks, scale)
                if bool(self.found_nonfinite.any()):
                    self._combine(flat, [], scale, accumulate=False)
                    self._raise_if_nonfinite()
            outputs, accumulate = gradients.combine_targets(shared, task_grads)
            if self.nonfinite == "raise":
                self._combine(flat, outputs, scale, accumulate=accumulate)
            else:
                self._call_op(
                    self._update_and_combine, flat, outputs, values, tasks, scale, accumulate
                )
            gradients.assign_grads(shared, outputs)
            if heads is not None:
                heads.add(self._head_weights())
        if self.num_tasks * self._bound_layout().num_params >= LEAST_NUMEL:
            self._heap_pin.move(flat)

    def _call_op(self, function: Any, *args: Any) -> Any:
        """Calls into the ops; what they say about an argument is the caller's error, in the caller's type."""
        try:
            return function(*args)
        except RuntimeError as error:
            # torch puts the place in the C++ source before the message.
            _, expected, rest = str(error).split("\n", 1)[0].partition("Expected `")
            if expected:
                raise ValueError(expected + rest) from None
            raise

    def _prepare(self, task_grads: list[Tensor]) -> None:
        """Sizes and places state that depends on the gradients; called before every step that uses them."""

    def _after_call(self) -> None:
        """Called at the end of every step, when state and ``.grad`` are written; must not change either."""

    def _min_weight(self) -> float:
        return 0.0

    def _raise_if_nonfinite(self) -> None:
        if self.nonfinite == "raise" and bool(self.found_nonfinite.any()):
            tasks = self.found_nonfinite.nonzero().flatten().tolist()
            raise FloatingPointError(
                f"The gradients of task(s) {tasks} are not finite. The balancer's state is as before this step. "
                "Look for a NaN or an overflow in that loss; nonfinite='skip' would count and skip such steps."
            )

    def _as_scale(self, grad_scale: Tensor | float | None) -> Tensor | None:
        if grad_scale is None:
            return None
        device = self.task_weights.device
        if isinstance(grad_scale, (int, float)):  # a fill: a GPU would wait for a copy
            return torch.full((), float(grad_scale), dtype=torch.float32, device=device)
        scale = torch.as_tensor(grad_scale, device=device).detach()
        if scale.numel() != 1:
            raise ValueError(
                f"Expected `grad_scale` to be one number, but got shape {list(scale.shape)}."
            )
        return scale.reshape(()).to(
            torch.float64 if scale.dtype == torch.float64 else torch.float32
        )

    def _bound_parameters(self) -> list[Tensor]:
        if self.shared_parameters is None:
            raise ValueError(
                "Expected `shared_parameters`: this balancer was made without them and cannot write gradients. Make "
                f"it as {type(self).__name__}(model.encoder.parameters(), num_tasks={self.num_tasks}), or use "
                "update_weights()."
            )
        return self.shared_parameters

    def _bound_layout(self) -> ParamLayout:
        assert self._layout is not None
        return self._layout

    def _flat_task_grads(self, task_grads: GivenGrads) -> tuple[list[Tensor], list[int]]:
        """Given gradients as the flat list the ops take, and the tasks that are present; state is ready for them."""
        rows, self._layout = given_gradients.checked_rows(task_grads, self.num_tasks, self._layout)
        if self._layout is None:
            return [], []
        flat = gradients.flat_rows(rows)
        self._prepare(flat)
        return flat, [
            task for task, row in enumerate(rows) if any(grad is not None for grad in row)
        ]

    def extra_repr(self) -> str:
        """The options, so that ``repr`` rebuilds the object (without its parameters)."""
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_tasks": self.num_tasks,
            "weight_scale": self.weight_scale,
            "head_weighting": self.head_weighting,
            "nonfinite": self.nonfinite,
        }
        if "task_grads" in self.requires:  # no other method has passes to batch
            options["batched"] = self.batched
        return options


class _BalancedLoss(torch.autograd.Function):
    """A scalar whose backward pass is a balanced step; the incoming gradient is the loss scale."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        balancer: Balancer,
        roots: list[Root | None],
        values: Tensor,
        num_samples: NumSamples | None,
        features: list[Tensor] | None,
        total: Tensor,
    ) -> Tensor:
        ctx.balancer, ctx.roots, ctx.values = balancer, roots, values
        ctx.num_samples, ctx.features = num_samples, features
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        scale = ctx.balancer._as_scale(grad_outputs[0])
        if scale is not None and scale.device.type == "cpu" and scale.item() == 1.0:
            scale = None  # what .backward() starts with; elsewhere a look would wait for the device
        with torch.enable_grad():
            ctx.balancer._run_step(ctx.roots, ctx.values, scale, ctx.num_samples, ctx.features)
        return (None,) * 7
