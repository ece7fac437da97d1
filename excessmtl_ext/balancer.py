"""The contract every balancing method keeps: the same verbs, the same state handling, the same conventions.

A balancer is a weighting method (:mod:`excessmtl_ext.weighting`) with verbs. It has an engine, which
runs the passes of a step, and observers; it owns no model and no optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from excessmtl_ext.arguments import check_choice, check_count
from excessmtl_ext.collapse import effective_num_tasks
from excessmtl_ext.engines import streaming
from excessmtl_ext.engines.balanced_loss import balanced_loss
from excessmtl_ext.engines.exact import ExactEngine
from excessmtl_ext.extra_state import Fields, option_numbers
from excessmtl_ext.given_gradients import GivenGrads, read_given
from excessmtl_ext.insight import Insight
from excessmtl_ext.open_step import OpenStep
from excessmtl_ext.shared_parameters import SharedParameters
from excessmtl_ext.skips import SkipGuard
from excessmtl_ext.state import MAX_TASKS, ParamLayout
from excessmtl_ext.step import (
    Batched,
    Engine,
    Features,
    HeadWeighting,
    Losses,
    NonFinite,
    NumSamples,
    Step,
    StreamingRule,
    WeightScale,
)
from excessmtl_ext.step_arguments import check_ready, in_order, read_step, without_autocast
from excessmtl_ext.weighting import WeightingMethod

_WITHOUT_EFFECT_ON_STATE = (
    "num_tasks",  # the shapes say it
    "nonfinite",
    "batched",
    "copy_gradients",
    "state_dtype",
    "rounding_seed",
)


class Balancer(WeightingMethod, Insight, OpenStep, SharedParameters):
    """Base of all balancing methods.

    ``backward(losses)`` fills ``.grad`` of the shared parameters with the weighted sum of the task
    gradients and ``.grad`` of all others (heads) with the gradient of their own loss.
    ``balancer(losses)`` gives a scalar whose ``.backward()`` does the same. ``accumulate`` and
    ``finish`` do it task by task. Gradients are added to ``.grad``, as autograd does.

    Args:
        shared_parameters: What all tasks share, usually ``model.encoder.parameters()``. Those that
            are frozen then have no state and stay frozen; those frozen later rest. A model: those of
            its parameters that at least two losses of the first step reach; ``print(balancer)``
            tells which, see :meth:`prepare`. None for a balancer that is only given gradients
            (:meth:`update_weights`).
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
            their ``features``. ``"auto"``: as fast as measured in the first eight of them.
            ``"stacked"``: a pass per task, with or without ``features``, whose weight gradients of
            deep convolutions are products with one input that is unfolded for all tasks (CPU). Gradients
            are equal up to rounding; :attr:`backward_mode` says what was done and why.
        copy_gradients: Copy the gradients of each pass before the next one. Needed where that writes
            into the same memory, as after ``torch.cuda.make_graphed_callables``; without it such
            gradients are an error. Costs one copy of each task's gradients per step.
        engine: Runs the passes, for a method that needs another engine than :class:`ExactEngine
            <excessmtl_ext.engines.exact.ExactEngine>`; ``batched`` is then the engine's.

    Raises:
        ValueError: an argument is out of range, or the parameters are empty, repeated or not
            leaves.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Tensor] | nn.Module | None = None,
        *,
        num_tasks: int,
        weight_scale: WeightScale = "simplex",
        head_weighting: HeadWeighting = "none",
        nonfinite: NonFinite = "skip",
        batched: Batched = False,
        copy_gradients: bool = False,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        check_count("num_tasks", num_tasks, 1)
        if num_tasks > MAX_TASKS:
            raise ValueError(f"Expected `num_tasks` <= {MAX_TASKS}, but got {num_tasks}.")
        check_choice("weight_scale", weight_scale, ("simplex", "num_tasks"))
        check_choice("head_weighting", head_weighting, ("none", "task_weights"))
        check_choice("nonfinite", nonfinite, ("skip", "raise"))
        self.num_tasks = num_tasks
        self.weight_scale: WeightScale = weight_scale
        self.weight_total = 1.0 if weight_scale == "simplex" else float(num_tasks)
        self.head_weighting: HeadWeighting = head_weighting
        self.nonfinite: NonFinite = nonfinite
        self.engine = ExactEngine(batched) if engine is None else engine
        self.batched: Batched = self.engine.batched
        self.copy_gradients = bool(copy_gradients)
        self.observers = [SkipGuard()]
        self.history = None
        self.num_calls = 0
        self.task_names: tuple[str, ...] | None = None
        self.stream = None
        self.layout: ParamLayout | None = None
        parameter = self.take_given(shared_parameters)
        device = torch.device("cpu") if parameter is None else parameter.device
        device = torch.device("cpu") if device.type == "meta" else device
        self.set_state(WeightingMethod.initial_state(self, device))

    # ---- state

    @property
    def effective_num_tasks(self) -> Tensor:
        """How many equally weighted tasks the weights amount to, 1 to T, as a tensor [] on their device (no sync).

        The squared sum of the weights over the sum of their squares (Kish 1965).
        """
        return effective_num_tasks(self.task_weights)

    @property
    def backward_mode(self) -> str:
        """How the latest step that needed task gradients ran the encoder's passes, and why."""
        return self.engine.backward_mode

    def reset(self) -> None:
        """Forgets everything: the state is as before the first step, also the sizes if no parameters were given."""
        self.stream = None
        self.task_names = None
        self.engine.reset()
        self.num_calls = 0
        for observer in self.observers:
            observer.restart()
        if self.shared_parameters is None or self.needs_features:
            self.layout = None
        self.set_state(self.initial_state(self.task_weights.device))

    def host_state(self) -> Fields:
        """Returns what ``state_dict`` holds besides the state tensors: the same fields whenever it is saved.

        A method with more of them adds its own, and takes them in :meth:`set_host_state`.
        """
        return {
            "num_calls": [float(self.num_calls)],
            "param_numels": [] if self.layout is None else list(map(float, self.layout.numels)),
            "options": option_numbers(self.saved_options()),
        }

    def set_host_state(self, fields: Fields) -> None:
        """Takes what :meth:`host_state` gave; called by ``load_state_dict`` after the checks."""
        self.num_calls = round(fields["num_calls"][0])
        if self.layout is None and fields["param_numels"]:
            self.layout = ParamLayout([round(numel) for numel in fields["param_numels"]])

    def saved_options(self) -> dict[str, Any]:
        """Returns the options that decide what the next steps do to the state, by name."""
        options = self.options()
        for name in _WITHOUT_EFFECT_ON_STATE:
            options.pop(name, None)
        return options

    @property
    def is_placeholder(self) -> bool:
        """Whether the shared parameters are on the meta device, so that there is no training to save."""
        return bool(self.shared_parameters) and self.shared_parameters[0].is_meta

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no history: its files and its memory on the device stay with the balancer that is recorded.
        observers = [observer for observer in self.observers if observer is not self.history]
        return {**self.__dict__, "history": None, "observers": observers}

    # ---- the verbs

    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        grad_scale: Tensor | float | None = None,
        num_samples: NumSamples | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Takes a balanced step: weights from ``losses``, then gradients into ``.grad``.

        Args:
            losses: T scalar losses: a list, with None where a task has no labels in this batch, one
                tensor [T], or a dict by task name, whose first key order is that of the tasks.
            features: Everything that the heads take from the encoder, one tensor or several. Each
                head is then walked by itself and its graph freed before the encoder's passes, which
                ``batched`` may make one; steps that only apply weights need a single one, and no
                division. Same gradients. Several ranks do not need it.
            grad_scale: Loss scale, as from ``GradScaler.get_scale()``: all gradients come out
                multiplied by it, the weights are computed without it.
            num_samples: With several ranks, samples behind each loss of this one: one number, or T.
                None: as many on each rank. 0: the loss weighs nothing. One process needs none.
            retain_graph: Keep the graphs of the losses for another backward pass through them, of
                another loss or another balancer.

        Raises:
            ValueError: number, shape, device or graph of losses or features is not as expected.
                State and shared ``.grad`` are then as before.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
            RuntimeError: another rank has failed; state and ``.grad`` are as before.
        """
        if self.search is not None:
            self.find_shared(losses)
        try:
            step = read_step(
                self,
                losses,
                grad_scale=grad_scale,
                features=features,
                num_samples=num_samples,
                retain_graph=retain_graph,
                runs_now=True,
            )
        except Exception as error:
            self.engine.refuse(self, error)
            raise
        self._run(step)

    def forward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        num_samples: NumSamples | None = None,
        retain_graph: bool = False,
    ) -> Tensor:
        """Returns the weighted loss as a scalar whose ``.backward()`` does what :meth:`backward` does.

        For loops that call ``backward`` themselves: Lightning, Accelerate, GradScaler (its scale is
        undone inside). Its value is the sum of the losses under the weights so far, of this rank's
        batch; a NaN loss is left out. Without ``.backward()`` nothing changes. Auxiliary losses may be
        added to it. The graphs are kept if ``.backward(retain_graph=True)`` or ``retain_graph`` says
        so. The other arguments are those of :meth:`backward`.
        """
        if self.search is not None:
            self.find_shared(losses)
        try:
            losses = in_order(self, losses)
            step = read_step(
                self,
                losses,
                features=features,
                num_samples=num_samples,
                retain_graph=retain_graph,
            )
        except Exception as error:
            self.engine.refuse(self, error)
            raise
        return balanced_loss(self, step, losses, self._run_later)

    def update_weights(
        self,
        task_grads: GivenGrads | None = None,
        losses: Sequence[Tensor | None] | Tensor | None = None,
        *,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor:
        """Moves the weights from gradients or losses that the caller has, and touches no ``.grad``.

        Args:
            task_grads: T lists of L gradients (None where there is none; an empty list for an
                absent task), or one [T, P].
            losses: T values, None for an absent task. What a method does not require may be left out.
            grad_scale: Factor that ``task_grads`` carry, to be undone.

        Returns:
            The new weights [T], float64.

        Raises:
            ValueError: what the method requires is missing, or does not fit.
        """
        self.refuse_open_step("update_weights()")
        if self.search is not None:
            self.require_found("update_weights()")
        try:
            step = read_given(self, task_grads, losses, grad_scale)
        except Exception as error:
            self.engine.refuse(self, error)
            raise
        self._close(step, self.engine.update(self, step))
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
        if self.search is not None:
            self.require_found("accumulate()")
        self.stream = streaming.accumulate(
            cast(StreamingRule, self),
            self.stream,
            task,
            loss,
            retain_graph=retain_graph,
            grad_scale=grad_scale,
        )

    def finish(self) -> None:
        """Streaming: moves the weights and adds the weighted sum of the step's gradients to the shared ``.grad``.

        Raises:
            RuntimeError: no task was accumulated since the last step.
        """
        stream = self.stream
        if stream is None:
            raise RuntimeError(
                "Expected accumulate() before finish(): no task has been taken in since the last step."
            )
        self.stream = None
        step = stream.finish(cast(StreamingRule, self))
        self._close(step, step.tasks)

    def begin(self, step: Step) -> None:
        """Looks at a step before its passes run; raises RuntimeError if it is not time for one."""

    def _run_later(self, step: Step) -> None:
        try:
            check_ready(self, step.shared)
        except Exception as error:
            self.engine.refuse(self, error)
            raise
        self._run(step)

    def _run(self, step: Step) -> None:
        self.begin(step)
        device = step.shared[0].device
        is_autocast = torch.is_autocast_enabled(device.type)
        with without_autocast(device) if is_autocast else nullcontext():
            self._close(step, self.engine.run(self, step))

    def _close(self, step: Step, tasks: Sequence[int]) -> None:
        """Ends a step: counts it and shows it to the observers; nothing if no task took part."""
        if not tasks or self.holds_weights:
            return
        if len(tasks) == 1 < self.num_tasks:
            self.end_lone_step(step, tasks[0])
        self.num_calls += 1
        for observer in self.observers:
            if self.num_calls % observer.period == 0:
                observer.on_end(self, step, tasks)

    def extra_repr(self) -> str:
        """Returns the options, so that ``repr`` rebuilds the object (without its parameters)."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of the constructor that rebuild the balancer."""
        options: dict[str, Any] = {
            "num_tasks": self.num_tasks,
            "weight_scale": self.weight_scale,
            "head_weighting": self.head_weighting,
            "nonfinite": self.nonfinite,
        }
        if "task_grads" in self.requires:  # no other method has passes to batch
            options["batched"] = self.batched
            options["copy_gradients"] = self.copy_gradients
        return options
