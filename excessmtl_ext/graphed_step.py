"""A training step as CUDA graphs: warm-up, fixed tensors for the batch, capture, copy and replay in one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines.gramian import GramianBalancer
from excessmtl_ext.batch_trees import kind_of, mapped
from excessmtl_ext.cuda_graphs import CudaGraphs, Replay, graphs_for
from excessmtl_ext.step import NO_TASK_GRADS, Step

NUM_WARMUP_STEPS = 3
"""Ordinary steps on a side stream before a capture, as torch advises: they make optimizer state and choose kernels."""


class _End(NamedTuple):
    """The end of a balanced step, as its observers see it."""

    step: Step
    tasks: list[int]


class _Ends:
    """Takes the place of a balancer's observers during a capture, which is no step."""

    period = 1
    wants_gradients = False

    def __init__(self) -> None:
        self.ends: list[_End] = []

    def on_gradients(self, rule: Any, step: Step) -> None:
        """Needs no gradients."""

    def on_end(self, rule: Any, step: Step, tasks: Sequence[int]) -> None:
        """Keeps what the observers are to see after each replay, without what only the passes need."""
        step.roots, step.features, step.task_grads = [], None, NO_TASK_GRADS
        self.ends.append(_End(step, list(tasks)))

    def restart(self) -> None:
        """Has nothing to forget."""


class _Graph(NamedTuple):
    replay: Replay
    outputs: Any
    ends: list[_End]
    grads: list[tuple[Tensor, Tensor | None]]
    addresses: tuple[int, ...]


@dataclass
class _Pattern:
    """The steps of batches that are alike but for the numbers in their tensors."""

    batch: Any
    """As given, with tensors at fixed addresses."""
    inputs: list[Tensor]
    """These tensors."""
    num_steps: int = 0
    graph: _Graph | None = field(default=None, repr=False)


class GraphedStep:
    """Runs a training step as one CUDA graph per kind of batch; without a GPU, step by step.

    The first steps of a kind are ordinary ones, then the step is captured, and from there on a call copies the batch to
    fixed tensors and replays the graph: the same steps as those of an ordinary loop, one per call. Batches are of one
    kind if their tensors have the same shapes, strides and types, and all else in them is equal: a batch in which
    another task's labels are None has a graph of its own, and so has a smaller last one.

    After each call the state of balancer and optimizer, ``num_calls``, ``.grad`` and a history are what an ordinary
    step leaves, and a step that is skipped leaves parameters and optimizer alone, on the device. A graph is captured
    anew after state was loaded or moved, or a number among the optimizer's options, such as ``lr``, has changed; a
    tensor, as in ``lr=torch.tensor(1e-3)``, may change without.

    Args:
        step_function: One whole training step of a batch: losses, ``optimizer.zero_grad()``, ``balancer.backward``,
            ``optimizer.step()``. What it returns, tensors in lists, tuples or dicts, is returned as copies. It may not
            look at values (``.item()``, ``if loss > 1``); what Python does in it, such as printing, is not repeated.
        example_batch: A batch as the loader yields them: tensors, None and constants, in lists, tuples or dicts.
        balancer: The balancer that ``step_function`` calls.
        optimizer: The optimizer that it calls: Adam, AdamW or SGD with ``fused=True``, which skip a step on the device.
            On a GPU Adam and AdamW need ``capturable=True`` too.
        num_warmup_steps: Ordinary steps of each kind of batch before its capture, at least 1.

    Raises:
        ValueError: an option of balancer or optimizer decides in Python or waits for the device; the message names it.
        TypeError: an argument has the wrong type.

    Example (docs/tutorials/cuda_graph.md has the whole program)::

        step = GraphedStep(step_function, batches[0], balancer, optimizer)
        for batch in batches:
            losses = step(batch)
    """

    def __init__(
        self,
        step_function: Callable[[Any], Any],
        example_batch: Any,
        balancer: Balancer,
        optimizer: Optimizer,
        *,
        num_warmup_steps: int = NUM_WARMUP_STEPS,
    ) -> None:
        if not callable(step_function):
            raise TypeError(
                f"Expected `step_function` to be callable, but got {type(step_function).__name__}."
            )
        if not isinstance(balancer, Balancer):
            raise TypeError(
                f"Expected `balancer` to be a Balancer, but got {type(balancer).__name__}."
            )
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Expected `optimizer` to be a torch.optim.Optimizer, but got {type(optimizer).__name__}."
            )
        if num_warmup_steps < 1:
            raise ValueError(f"Expected `num_warmup_steps` >= 1, but got {num_warmup_steps}.")
        self._run_step = step_function
        self._balancer = balancer
        self._optimizer = optimizer
        self._num_warmup_steps = num_warmup_steps
        self._device = balancer.task_weights.device
        self._graphs = graphs_for(self._device)
        self._patterns: dict[Any, _Pattern] = {}
        self._options: Any = None
        self._check()
        self._pattern_of(example_batch)

    @property
    def num_graphs(self) -> int:
        """How many kinds of batches have a graph; 0 where steps are not captured."""
        return sum(pattern.graph is not None for pattern in self._patterns.values())

    def reset(self) -> None:
        """Drops all graphs and their memory."""
        self._patterns.clear()

    def __call__(self, batch: Any) -> Any:
        """Takes one training step of ``batch``; returns what ``step_function`` returns.

        Raises:
            RuntimeError: the step cannot be captured; it has not been taken, and the state is as before.
        """
        self._check()
        if torch.is_autocast_enabled(self._device.type) and torch.is_autocast_cache_enabled():
            raise RuntimeError(
                "Expected autocast within `step_function`, but the call is within it: weights cast before would be "
                "part of the graph. Move `with torch.autocast(...)` into the function."
            )
        pattern = self._pattern_of(batch)
        if self._graphs is None:
            return self._ordinary(pattern)
        if pattern.graph is not None and pattern.graph.addresses != self._addresses():
            pattern.graph, pattern.num_steps = None, self._num_warmup_steps - 1
        if pattern.graph is None:
            if pattern.num_steps < self._num_warmup_steps:
                pattern.num_steps += 1
                return self._graphs.warm_up(lambda: self._ordinary(pattern))
            pattern.graph = self._captured(self._graphs, pattern)
        return self._replayed(pattern.graph)

    # ---- batches

    def _pattern_of(self, batch: Any) -> _Pattern:
        """Returns what is known of batches like this one; the batch is copied to their fixed tensors."""
        options = _numbers_of(self._optimizer)
        if options != self._options:
            self._options = options
            for pattern in self._patterns.values():
                pattern.graph = None  # numbers are part of a graph
        given: list[Tensor] = []
        key = kind_of(batch, given)
        pattern = self._patterns.get(key)
        if pattern is None:
            inputs: list[Tensor] = []

            def fixed(tensor: Tensor) -> Tensor:
                inputs.append(torch.empty_like(tensor, device=self._device))
                return inputs[-1]

            pattern = self._patterns[key] = _Pattern(mapped(batch, fixed), inputs)
        with torch.no_grad():
            for target, tensor in zip(pattern.inputs, given, strict=True):
                target.copy_(tensor, non_blocking=True)
        return pattern

    # ---- steps

    def _ordinary(self, pattern: _Pattern) -> Any:
        with self._skips_on_the_device():
            return self._run_step(pattern.batch)

    @contextmanager
    def _skips_on_the_device(self) -> Iterator[None]:
        """Lets the optimizer leave parameters alone where the balancer skips its step, as GradScaler does it."""
        optimizer: Any = self._optimizer
        had_flag = hasattr(optimizer, "found_inf")

        def look(*_: Any) -> None:
            optimizer.found_inf = self._balancer.found_nonfinite.any().float()

        handle = None if had_flag else optimizer.register_step_pre_hook(look)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
                if hasattr(optimizer, "found_inf"):
                    del optimizer.found_inf

    def _captured(self, graphs: CudaGraphs, pattern: _Pattern) -> _Graph:
        balancer, recorder = self._balancer, _Ends()
        observers, num_calls, before = balancer.observers, balancer.num_calls, self._addresses()
        balancer.observers = [recorder]  # a capture is no step: nobody sees it, nothing counts it
        try:
            replay, outputs = graphs.capture(lambda: self._ordinary(pattern))
        except Exception as error:
            for parameter in self._parameters():
                parameter.grad = None
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"`step_function` cannot be captured as a CUDA graph: {first_line} It may not read values from the "
                "device (.item(), print, if, a GradScaler) nor wait for it, nor make shapes that depend on values."
            ) from error
        finally:
            balancer.observers, balancer.num_calls = observers, num_calls
        if not recorder.ends:
            raise RuntimeError(
                "Expected `step_function` to call the `balancer` that was given, but it took no step. Give the "
                "balancer that the function calls."
            )
        addresses = self._addresses()
        if addresses != before:
            raise RuntimeError(
                "Expected a step to change state in place, but a tensor of balancer or optimizer was replaced in it. "
                "Increase `num_warmup_steps` if it is made in a later step."
            )
        grads = [(parameter, parameter.grad) for parameter in self._parameters()]
        return _Graph(replay, outputs, recorder.ends, grads, addresses)

    def _replayed(self, graph: _Graph) -> Any:
        graph.replay()
        for parameter, grad in graph.grads:
            parameter.grad = grad
        balancer = self._balancer
        for step, tasks in graph.ends:
            balancer.num_calls += 1
            for observer in balancer.observers:
                if balancer.num_calls % observer.period == 0:
                    observer.on_end(balancer, step, tasks)
        return mapped(graph.outputs, lambda tensor: tensor.detach().clone())

    def _parameters(self) -> list[Tensor]:
        of_optimizer = [p for group in self._optimizer.param_groups for p in group["params"]]
        all_of_them = [*of_optimizer, *(self._balancer.shared_parameters or ())]
        return list({id(parameter): parameter for parameter in all_of_them}.values())

    def _addresses(self) -> tuple[int, ...]:
        """Returns where everything lies that a step reads and writes besides the batch."""
        of_optimizer = [
            value
            for values in self._optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        tensors = [*self._balancer.state_tensors().values(), *self._parameters(), *of_optimizer]
        return tuple(map(Tensor.data_ptr, tensors))

    # ---- what cannot be captured

    def _check(self) -> None:
        """Raises ValueError for what Python decides in each step, or what waits for the device."""
        _check_balancer(self._balancer)
        optimizer: Any = self._optimizer
        name = type(optimizer).__name__
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"Expected `optimizer` to skip a step on the device, but this {name} cannot. Use Adam, AdamW or SGD "
                "with fused=True."
            )
        if self._graphs is not None and not all(
            group.get("capturable", True) for group in optimizer.param_groups
        ):
            raise ValueError(
                f"Expected `optimizer` with capturable=True, but this {name} counts its steps on the host."
            )
        for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
            if hooks:
                raise ValueError(
                    f"Expected `optimizer` without hooks of its step, but it has {next(iter(hooks.values()))}, which a "
                    "replay does not call. Call it after the graphed step."
                )


def _check_balancer(balancer: Balancer) -> None:
    tasks_per_step = getattr(balancer, "tasks_per_step", None)
    history, method = balancer.history, type(balancer).__name__
    expected = None
    if balancer.update_every != 1:
        expected = f"update_every=1, but got {balancer.update_every}: it makes steps of two kinds"
    elif tasks_per_step is not None and tasks_per_step < balancer.num_tasks:
        expected = f"tasks_per_step=None, but got {tasks_per_step}: Python decides whose turn it is"
    elif balancer.nonfinite == "raise":
        expected = "nonfinite='skip', but got 'raise', which waits for the device"
    elif balancer.batched == "auto":
        expected = "batched=True, False or 'stacked', but got 'auto', which times its first steps"
    elif balancer.engine.shards_state:
        expected = "one process: ranks exchange numbers on the host in each step"
    elif isinstance(balancer, GramianBalancer) and "task_grads" in balancer.requires:
        expected = f"weights computed on the device, but {method} solves for them on the CPU"
    elif balancer.stream is not None:
        expected = "no streamed step under way: call finish() first"
    elif history is not None and not history.is_closed and history.has_gradients:
        expected = "record_history(gradients=False): a replay shows no gradients"
    if expected is not None:
        raise ValueError(
            f"Expected `balancer` with {expected}. Other steps cannot be captured as a CUDA graph."
        )


def _numbers_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the options of an optimizer that become part of a graph."""
    return [
        {
            name: value
            for name, value in group.items()
            if name != "params" and not isinstance(value, Tensor)
        }
        for group in optimizer.param_groups
    ]
