"""A training step as one compiled graph: forward pass, T backward passes and the balancer's op.

``torch._dynamo.config.trace_autograd_ops`` lets torch.compile trace ``torch.autograd.grad``. What Python
keeps, counters, history and which kind of step comes next, stays in a thin shell around the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.batch_trees import kind_of
from excessmtl_ext.engines.exact import ExactEngine
from excessmtl_ext.passes.capture import leaves_of
from excessmtl_ext.step import Step, Targets, TaskGrads
from excessmtl_ext.step_arguments import in_order

LossFunction = Callable[..., Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor]


def can_trace() -> bool:
    """Returns whether this torch traces backward passes within a function."""
    import torch._dynamo.config as config

    return hasattr(config, "trace_autograd_ops")


class CompiledStep:
    """Computes the losses of a batch and takes a balanced step, as one graph of ``torch.compile``.

    The first call of each kind of batch is an ordinary step: it sizes the state and finds the
    parameters. Batches are of one kind if their tensors have the same shapes and types, and all else
    in them is equal. Later calls run a graph: one for steps that move the weights, one for steps that
    apply them. ``.grad``, state, ``num_calls`` and a history are what ``balancer.backward`` leaves: to
    the bit with ``backend="aot_eager"``, up to the rounding of its fused kernels with Inductor.

    Args:
        balancer: An ExcessMTL that runs one pass per task in one process.
        loss_function: ``loss_function(*batch)`` gives T losses, as for ``balancer.backward``. Traced as one graph: no
            printing, no ``.item()``.
        optimizer: Steps after each call, not within the graph; not where a gradient is not finite, which waits for the
            device unless it is one with ``fused=True``.
        close: Counts a step and shows it to the balancer's observers.
        mode: Of ``torch.compile``; ``"reduce-overhead"`` makes CUDA graphs on a GPU.
        backend: Of ``torch.compile``.

    Raises:
        ValueError: the balancer's steps cannot be one graph; the message names the option.

    Warns:
        RuntimeWarning: once, where this torch cannot trace a step, or the loss function is not one graph. Steps are
            ordinary ones then.
    """

    def __init__(
        self,
        balancer: Balancer,
        loss_function: LossFunction,
        optimizer: Optimizer | None = None,
        *,
        close: Callable[[Step, Sequence[int]], None],
        mode: str | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        _check(balancer)
        if not callable(loss_function):
            raise TypeError(
                f"Expected `loss_function` to be callable, but got {type(loss_function).__name__}."
            )
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Expected `optimizer` to be a torch.optim.Optimizer, but got {type(optimizer).__name__}."
            )
        self._balancer = balancer
        self._loss_function = loss_function
        self._close = close
        self._optimizer = optimizer
        self._others: list[Tensor] = []
        self._kinds: set[Any] = set()
        self._compiled: set[tuple[Any, bool]] = set()
        self._obstacle = None if can_trace() else f"torch {torch.__version__} cannot trace one"
        self._has_warned = False
        options: dict[str, Any] = {"fullgraph": True, "backend": backend, "mode": mode}
        self._graphs = {
            True: torch.compile(self._move, **options),
            False: torch.compile(self._apply, **options),
        }

    @property
    def is_compiled(self) -> bool:
        """Whether calls run a graph, as far as is known."""
        return self._obstacle is None

    def __call__(self, *batch: Any) -> Tensor:
        """Takes one step; returns the losses [T], detached, NaN for absent tasks."""
        balancer = self._balancer
        _check(balancer)
        kind = kind_of(batch, [])
        everything = (*(balancer.shared_parameters or ()), *self._others)
        is_whole = all(parameter.requires_grad for parameter in everything)  # none is frozen now
        if self._obstacle is None and kind in self._kinds and is_whole:
            balancer.follow(None)  # the graph's outputs are contiguous
            moves = balancer.num_calls % balancer.update_every == 0 and not balancer.holds_weights
            try:
                losses, grads, tasks = self._run_graph(batch, kind, moves=moves)
            except (
                torch._dynamo.exc.TorchDynamoException  # pyright: ignore
            ) as error:  # while compiling: nothing has run
                self._obstacle = (str(error).splitlines() or [type(error).__name__])[0]
            else:
                self._end(losses, grads, tasks, moves=moves)
                self._step_optimizer()
                return losses
        self._warn()
        losses = self._ordinary(batch, kind)
        self._step_optimizer()
        return losses

    # ---- the graphs

    def _losses(self, batch: Sequence[Any]) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Returns the losses [T], and those of the tasks that are present."""
        balancer = self._balancer
        given = in_order(balancer, self._loss_function(*batch))
        roots = list(given.unbind()) if isinstance(given, Tensor) else list(given)
        present = [(task, root) for task, root in enumerate(roots) if root is not None]
        return _values(roots), present

    def _move(self, *batch: Any) -> tuple[Tensor, list[Tensor | None], list[int]]:
        """Takes a step that moves the weights; returns the losses, a gradient per parameter, and the tasks."""
        balancer, others = self._balancer, self._others
        shared, layout = balancer.shared_parameters, balancer.layout
        assert shared is not None
        assert layout is not None
        values, present = self._losses(batch)
        none = values.new_empty(0)
        rows: list[Tensor] = [none] * (balancer.num_tasks * len(shared))
        of_others: list[tuple[int, Sequence[Tensor | None]]] = []
        reached = [False] * len(shared)
        for position, (task, loss) in enumerate(present):
            grads = torch.autograd.grad(
                loss,
                [*shared, *others],
                retain_graph=position + 1 < len(present),
                allow_unused=True,
            )
            for index, grad in enumerate(grads[: len(shared)]):
                if grad is not None:
                    rows[task * len(shared) + index] = grad
                    reached[index] = True
            of_others.append((task, grads[len(shared) :]))
        tasks = [task for task, _ in present]
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            outputs = [
                torch.empty_like(each, memory_format=torch.contiguous_format) if was else none
                for each, was in zip(shared, reached, strict=True)
            ]
            step = Step(
                roots=[],
                tasks=tasks,
                shared=list(shared),
                task_grads=TaskGrads(rows, layout, range(balancer.num_tasks)),
            )
            balancer.update_and_combine(step, Targets(outputs, False))
            combined: list[Tensor | None] = [
                output if was else None for output, was in zip(outputs, reached, strict=True)
            ]
            return values, [*combined, *self._summed(of_others)], tasks

    def _summed(
        self, of_others: Sequence[tuple[int, Sequence[Tensor | None]]]
    ) -> list[Tensor | None]:
        """Returns the gradients of the other parameters, added up over the tasks as the balancer weighs heads."""
        balancer = self._balancer
        is_weighted = balancer.head_weighting == "task_weights"
        factors = balancer.head_weights() if is_weighted else None
        totals: list[Tensor | None] = [None] * len(self._others)
        for task, grads in of_others:
            for index, grad in enumerate(grads):
                if grad is None:
                    continue
                added = grad if factors is None else grad * factors[task].to(grad.dtype)
                total = totals[index]
                totals[index] = added if total is None else total + added
        return totals

    def _apply(self, *batch: Any) -> tuple[Tensor, list[Tensor | None], list[int]]:
        """Takes a step that only applies the weights."""
        balancer, others = self._balancer, self._others
        shared = balancer.shared_parameters
        assert shared is not None
        values, present = self._losses(batch)
        with torch.no_grad():
            balancer.found_nonfinite.zero_()
            weights = balancer.pass_weights()
            of_heads = (
                balancer.head_weights() if balancer.head_weighting == "task_weights" else None
            )
        tasks = [task for task, _ in present]
        losses = [loss for _, loss in present]

        def starts(factors: Tensor | None) -> list[Tensor]:
            ones = [torch.ones_like(loss) for loss in losses]
            if factors is None:
                return ones
            return [one * factors[task].to(one) for task, one in zip(tasks, ones, strict=True)]

        head_grads: Sequence[Tensor | None] = ()
        if others:
            head_grads = torch.autograd.grad(
                losses, others, starts(of_heads), retain_graph=True, allow_unused=True
            )
        grads = torch.autograd.grad(losses, list(shared), starts(weights), allow_unused=True)
        return values, [*grads, *head_grads], tasks

    # ---- the shell

    def _run_graph(
        self, batch: Sequence[Any], kind: Any, *, moves: bool
    ) -> tuple[Tensor, list[Tensor | None], list[int]]:
        with ExitStack() as stack:
            stack.enter_context(
                torch._dynamo.config.patch(trace_autograd_ops=True)  # pyright: ignore[reportPrivateUsage]
            )
            if (kind, moves) not in self._compiled:
                # Caches of sizes, which are constants of a graph.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings(
                    "ignore", "Dynamo detected a call to a `functools.lru_cache`"
                )
            result = self._graphs[moves](*batch)
        self._compiled.add((kind, moves))
        return result

    def _end(
        self, losses: Tensor, grads: Sequence[Tensor | None], tasks: list[int], *, moves: bool
    ) -> None:
        balancer = self._balancer
        shared = balancer.shared_parameters
        assert shared is not None
        for parameter, grad in zip([*shared, *self._others], grads, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        step = Step(roots=[], tasks=tasks, shared=list(shared), losses=losses, moves_weights=moves)
        self._close(step, tasks)

    def _ordinary(self, batch: Sequence[Any], kind: Any) -> Tensor:
        """Takes a step of :meth:`Balancer.backward`, which finds the parameters besides the shared ones."""
        balancer = self._balancer
        given = in_order(balancer, self._loss_function(*batch))
        roots = list(given.unbind()) if isinstance(given, Tensor) else list(given)
        shared = balancer.shared_parameters or []
        known = {id(parameter) for parameter in (*shared, *self._others)}
        leaves = leaves_of(*(root for root in roots if root is not None))
        new = [leaf for key, leaf in leaves.items() if key not in known]
        values = _values(roots)
        balancer.backward(given)
        if any(_has_hook(parameter) for parameter in (*shared, *new)):
            self._obstacle = self._obstacle or "a parameter has a hook"
        if new:
            self._others += new  # what is in a graph already is guarded by the length of this list
        self._kinds.add(kind)
        return values

    def _step_optimizer(self) -> None:
        optimizer: Any = self._optimizer
        if optimizer is None:
            return
        flags = self._balancer.found_nonfinite
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            if not bool(flags.any()):
                optimizer.step()
            return
        optimizer.found_inf = flags.any().float()  # as GradScaler does it: nothing waits
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf

    def _warn(self) -> None:
        if self._obstacle is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"The step cannot be one compiled graph ({self._obstacle}). It runs step by step, which is slower.",
                RuntimeWarning,
                stacklevel=3,
            )


def _values(roots: Sequence[Tensor | None]) -> Tensor:
    """Returns the losses [T], detached, NaN for absent tasks."""
    nan = next(root for root in roots if root is not None).detach().new_full((), float("nan"))
    return torch.stack([nan if root is None else root.detach().reshape(()) for root in roots])


def _has_hook(parameter: Tensor) -> bool:
    hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
    return any(hooks)


def _check(balancer: Balancer) -> None:
    expected = None
    if type(balancer.engine) is not ExactEngine:
        expected = "one process and a pass per task: no `process_group`, `estimate_from` or `tasks_per_step`"
    elif balancer.engine.batched is not False:
        expected = f"batched=False, but got {balancer.batched!r}"
    elif balancer.shared_parameters is None:
        expected = "`shared_parameters`, given or found by prepare(losses)"
    elif balancer.nonfinite == "raise":
        expected = "nonfinite='skip', but got 'raise', which waits for the device"
    elif balancer.stream is not None:
        expected = "no streamed step under way: call finish() first"
    elif any(observer.wants_gradients for observer in balancer.observers):
        expected = "record_history(gradients=False): a compiled step shows no gradients"
    if expected is not None:
        raise ValueError(
            f"Expected `balancer` with {expected}. Other steps cannot be one compiled graph."
        )
