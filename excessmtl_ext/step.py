"""One step on its way from a verb to ``.grad``, and the three protocols of those who handle it.

A :class:`Balancer <excessmtl_ext.Balancer>` reads its arguments into a :class:`Step`
(:mod:`excessmtl_ext.step_arguments`). An
:class:`Engine` runs the backward passes and hands the step to a :class:`WeightingRule`, which moves
the weights and combines the gradients. An :class:`Observer` looks and changes nothing.

Symbols: T tasks, L shared parameter tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from excessmtl_ext.dense_order import DenseOrder
from excessmtl_ext.state import ParamLayout, StepOptions, StepState

WeightScale = Literal["simplex", "num_tasks"]
HeadWeighting = Literal["none", "task_weights"]
NonFinite = Literal["skip", "raise"]

Batched: TypeAlias = bool | Literal["auto", "stacked"]
"""True: one vectorised pass where possible; False: a pass per task; ``"auto"``: the faster of the two here;
``"stacked"``: a pass per task without the weight gradients of deep convolutions, which share an unfolded input."""

Losses: TypeAlias = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]
"""T scalar losses: a list (None where a task has no labels in this batch), one tensor [T], or a dict by task name."""

Features: TypeAlias = Tensor | Sequence[Tensor]
"""Output of the encoder that the heads take: one tensor, or several (levels of a pyramid, one per task, ...)."""

NumSamples: TypeAlias = float | Sequence[float]
"""Samples behind each loss of this rank: one number, or T."""

Root: TypeAlias = Tensor | GradientEdge
"""Start of the backward pass of one task."""

input_metadata_of: Callable[[Node], Sequence[Any]] = attrgetter("_input_metadata")
"""Shape, dtype and device of each gradient that a node of the graph takes; torch has no public name for it."""


class TaskGrads(NamedTuple):
    """Gradients of R tasks with respect to the same L parameters, as the ops take them."""

    tensors: list[Tensor]
    """R * L gradients, task-major; one without elements where a task does not reach a parameter."""
    layout: ParamLayout
    """Sizes of the L parameters."""
    tasks: Sequence[int]
    """The task of each row: all T, or the one whose gradients these are."""


NO_TASK_GRADS = TaskGrads([], ParamLayout([]), ())


class Targets(NamedTuple):
    """Tensors that receive a weighted sum of gradients."""

    outputs: list[Tensor]
    """L contiguous tensors, or none where nothing is to be written."""
    accumulate: bool
    """Add to the outputs instead of overwriting them."""


NO_TARGETS = Targets([], False)


class StreamedWeight(NamedTuple):
    """Weight of a task in a streamed step, up to constants common to all tasks."""

    log_weight: Tensor
    """[], its log-weight."""
    log_scale: Tensor | None = None
    """[] or [L], logarithm of the factor that brings its gradients to size; None: 0."""


@dataclass(slots=True)
class Step:
    """One call of a verb: what the caller gave, and the gradients once they are known.

    Attributes:
        roots: One per task, None where the task is absent; the loss of the task that streams in; empty where gradients
            are given.
        tasks: The tasks that are present.
        shared: The L shared parameters.
        starts: The gradient that the pass of each root starts with: ones, or the scale.
        losses: [T], detached, NaN for an absent task; None where no method asks for them.
        grad_scale: [], the factor that all gradients carry (a loss scale), or None.
        features: The encoder's output, or None where the caller did not pass it.
        has_no_labels: [T] bool, the tasks whose loss of NaN is that of a batch without labels; None: none.
        num_samples: Samples behind the losses of this rank.
        moves_weights: Whether this step moves the weights or only applies them.
        retain_graph: Keep the graphs of the losses for another backward pass.
        copy_gradients: Copy the gradients of each pass before the next one.
        order: In which order of their elements ``task_grads`` and targets are seen; None: the contiguous one.
        task_grads: The gradients, for rules that require them; set by the engine.
    """

    roots: list[Root | None]
    tasks: list[int]
    shared: list[Tensor]
    starts: list[Tensor | None] = field(default_factory=list)
    losses: Tensor | None = None
    has_no_labels: Tensor | None = None
    grad_scale: Tensor | None = None
    features: list[Tensor] | None = None
    num_samples: NumSamples | None = None
    moves_weights: bool = True
    retain_graph: bool = False
    copy_gradients: bool = False
    order: DenseOrder | None = None
    task_grads: TaskGrads = NO_TASK_GRADS

    def keep_only(self, task: int) -> None:
        """Makes every other task absent."""
        self.roots = [root if index == task else None for index, root in enumerate(self.roots)]
        self.starts = [start if index == task else None for index, start in enumerate(self.starts)]
        self.tasks = [present for present in self.tasks if present == task]

    def losses_like(self, tensor: Tensor) -> Tensor:
        """Returns the losses in the dtype and on the device of ``tensor``, for rules that require them."""
        assert self.losses is not None
        return self.losses.to(tensor)


# ---- the protocols


class WeightingRule(Protocol):
    """What an engine may ask of a method."""

    requires: frozenset[str]
    """What weights are computed from: ``"task_grads"``, ``"losses"``, both, or nothing."""
    num_tasks: int
    weight_total: float
    min_weight: float | tuple[float, ...]
    head_weighting: HeadWeighting
    nonfinite: NonFinite
    has_uniform_weights: bool
    """Whether all weights are equal, whatever happens."""
    shared_parameters: list[Tensor] | None
    layout: ParamLayout | None
    """Sizes of the parameters that risks are estimated from, where they are known."""
    engine: Engine
    observers: list[Observer]
    num_calls: int
    """Steps so far."""
    update_every: int
    """Weights move on every so many calls."""
    holds_weights: bool
    """Whether steps only apply the weights for the time being."""
    follows_order: bool
    """Whether its state takes the order in which the parameters lie in memory."""
    copy_gradients: bool
    """Whether the gradients of each pass are copied before the next one."""
    frozen_parameters: dict[int, Tensor]
    """Shared parameters that did not require grad when the rule was made, by position."""
    task_names: tuple[str, ...] | None
    """Keys of the losses, where they come as a mapping."""

    state_names: tuple[str, ...]
    """Attributes that hold the state, all tensors."""

    task_weights: Tensor
    found_nonfinite: Tensor
    num_skipped_steps: Tensor

    @property
    def stream(self) -> object:
        """The step that ``accumulate`` has begun, or None."""
        ...

    def refuse_open_step(self, what: str) -> None:
        """Raises RuntimeError where ``accumulate`` has begun a step; ``what`` has to wait for its end."""
        ...

    def update(self, step: Step) -> None:
        """Moves the weights by one step."""
        ...

    def combine(self, step: Step, targets: Targets) -> None:
        """Writes the weighted sum of the gradients; NaN after a non-finite step."""
        ...

    def update_and_combine(self, step: Step, targets: Targets) -> None:
        """:meth:`update`, then :meth:`combine` with the new weights."""
        ...

    def head_weights(self) -> Tensor:
        """Factors [T] of the head gradients where those are weighted."""
        ...

    def pass_weights(self) -> Tensor:
        """Factors [T] of the task gradients in a step of one pass for all tasks."""
        ...

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes ``tensors`` the state again."""
        ...


class StreamingRule(WeightingRule, Protocol):
    """A rule in which the new weight of a task needs that task's gradient or loss only."""

    can_stream: bool
    log_task_weights: Tensor

    def stream_task(self, step: Step) -> StreamedWeight:
        """Takes in one task; returns its new weight."""
        ...

    def stream_finish(self, step: Step) -> Tensor | None:
        """Moves the weights once every task has been taken in; returns log-factors [L] of the sum, or None for 0."""
        ...


class FisherRule(WeightingRule, Protocol):
    """A rule whose state and options are those of the ops (ExcessMTL)."""

    feature_dim: int
    feature_adapter: Literal["auto", "full", "low_rank", "diagonal"]

    @property
    def step_state(self) -> StepState:
        """The state: the rule's own tensors."""
        ...

    @property
    def step_options(self) -> StepOptions:
        """The choices."""
        ...

    def ready_state(self, step: Step) -> tuple[StepState, StepOptions]:
        """Sizes and places the state for the gradients of ``step``; returns it with the choices."""
        ...

    @property
    def has_plain_step(self) -> bool:
        """Whether the weights need the sums of the risks only, and the sum of the gradients the weights [T] only."""
        ...

    def sum_weights(self) -> Tensor:
        """Factors [T] or [T, L] of the task gradients in the sum of the latest step."""
        ...

    def commit(self, risk_sums: Tensor, square_sums: Tensor | None, tasks: Sequence[int]) -> None:
        """Moves the weights by the sums of a step [T] and [T, L], where S and m have taken it in."""
        ...

    def tasks_without_size(self, tasks: Sequence[int]) -> list[int]:
        """Returns those of ``tasks`` whose gradients have to be brought to one size and have none yet."""
        ...

    def take_size(self, step: Step) -> None:
        """Takes in the size of one task's gradients and nothing else."""
        ...

    def take_turns(self, step: Step, turns: Sequence[Step], served: Sequence[int] | None) -> Tensor:
        """Takes in the gradients of some tasks; once all of a round are in, moves the weights.

        Args:
            step: Its gradients are those of all T tasks, without elements for the others.
            turns: A step per task taken in.
            served: The tasks of the round that ends here, or None.

        Returns:
            Factors [T] of the task gradients in a step of one pass; NaN where a gradient is not finite.
        """
        ...

    def move_weights(self, tasks: Sequence[int]) -> None:
        """Moves the weights once ``tasks`` have been taken in."""
        ...


class Engine(Protocol):
    """Runs the passes of a step; chosen once, from the options."""

    batched: Batched
    stream_obstacle: str | None
    """Why ``accumulate`` does not work, as a message, or None."""
    statistics_obstacle: str | None
    """Why no statistics of the gradients can be recorded, as a message, or None."""
    allows_hooks: bool
    """Whether hooks may wait for the shared gradients: each is then accumulated once, as a weighted sum."""
    stacker: Any
    """What computes weight gradients beside the passes (:mod:`excessmtl_ext.passes.stacked`), or None."""
    shards_state: bool
    """Whether each rank holds a part of the state (:class:`excessmtl_ext.distributed.DataParallel`)."""

    @property
    def backward_mode(self) -> str:
        """How the latest step that needed task gradients ran the encoder's passes, and why."""
        ...

    @property
    def num_held_bytes(self) -> int:
        """Bytes held between steps besides the state."""
        ...

    def live_task_grads(self, rule: WeightingRule) -> tuple[float, str]:
        """Returns the most gradients of all shared parameters that live at once in a step, and what they are."""
        ...

    def run(self, rule: Any, step: Step) -> Sequence[int]:
        """Runs a step up to ``.grad``; returns the tasks that took part, none if it was no step."""
        ...

    def update(self, rule: Any, step: Step) -> Sequence[int]:
        """Moves the weights of ``rule`` from gradients or losses that the caller has; returns as :meth:`run`."""
        ...

    def refuse(self, rule: Any, error: Exception) -> None:
        """Learns that the arguments of a step were refused with ``error``, which is raised afterwards."""
        ...

    def reset(self) -> None:
        """Returns to the state before the first step."""
        ...


class Observer(Protocol):
    """Looks at a step without changing it."""

    period: int
    """Told of the end of every ``period``-th step."""
    wants_gradients: bool

    def on_gradients(self, rule: Any, step: Step) -> None:
        """Sees the task gradients before combining overwrites them."""
        ...

    def on_end(self, rule: Any, step: Step, tasks: Sequence[int]) -> None:
        """Sees the written state; ``tasks`` took part."""
        ...

    def restart(self) -> None:
        """Forgets what it saw: the state is reset."""
        ...


def has_floor(rule: WeightingRule) -> bool:
    """Tells whether some weight has a floor."""
    floor = rule.min_weight
    return max(floor) > 0.0 if isinstance(floor, tuple) else floor > 0.0


# ---- what the ops and the gradients say


def raise_argument_error(error: RuntimeError) -> None:
    """Raises what an op says about an argument as the caller's ValueError; returns if it says nothing of the kind."""
    # torch puts the place in the C++ source before the message.
    _, expected, rest = str(error).split("\n", 1)[0].partition("Expected `")
    if expected:
        raise ValueError(expected + rest) from None


def raise_if_nonfinite(rule: WeightingRule) -> None:
    """Raises FloatingPointError where the latest gradients are not finite and the rule asks for it."""
    if rule.nonfinite == "raise" and bool(rule.found_nonfinite.any()):
        tasks = rule.found_nonfinite.nonzero().flatten().tolist()
        raise FloatingPointError(
            f"The gradients of task(s) {tasks} are not finite. The balancer's state is as before this step. "
            "Look for a NaN or an overflow in that loss; nonfinite='skip' would count and skip such steps."
        )
