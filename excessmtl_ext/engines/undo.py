"""Restores state and gradients where a step fails after it has moved the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from excessmtl_ext.passes.per_task import raise_if_reused
from excessmtl_ext.passes.reused_memory import BEFORE, THIS_STEP, copied
from excessmtl_ext.step import WeightingRule


class Before:
    """The state of a rule before a step.

    Tensors [T] and smaller are copied at once. Of those that hold P elements per task, only the
    rows that :meth:`keep_rows` names: what the step is about to write.

    Args:
        rule: Whose state it is.
    """

    def __init__(self, rule: WeightingRule) -> None:
        self._rule = rule
        self._tensors = {name: getattr(rule, name) for name in rule.state_names}
        self._copies = {
            name: tensor.clone() for name, tensor in self._tensors.items() if tensor.dim() < 2
        }
        self._rows: dict[tuple[str, int], Tensor] = {}

    def keep_rows(self, tasks: Sequence[int]) -> None:
        """Copies the rows of ``tasks`` of the large tensors."""
        for name, tensor in self._tensors.items():
            if tensor.dim() >= 2 and tensor.numel() > 0:
                for task in tasks:
                    self._rows.setdefault((name, task), tensor[task].clone())

    def keep_whole(self, *names: str) -> None:
        """Copies the named tensors, which have a few numbers per task."""
        self._copies.update({name: self._tensors[name].clone() for name in names})

    def restore(self) -> None:
        """Makes the state what it was, to the bit."""
        self._rule.put_back(self._tensors)
        for name, copy in self._copies.items():
            self._tensors[name].copy_(copy)
        for (name, task), row in self._rows.items():
            self._tensors[name][task].copy_(row)

    def restore_where(self, is_bad: Tensor, flags: Tensor) -> None:
        """Makes the small tensors of the state what they were, and counts a skip, where ``is_bad`` [] says so.

        Args:
            is_bad: Whether the step does not count; not read by the host.
            flags: [T] bool, the tasks at fault.
        """
        rule = self._rule
        found = rule.found_nonfinite.clone()
        num_skipped = rule.num_skipped_steps + ~found.any()
        for name, copy in self._copies.items():
            tensor = self._tensors[name]
            tensor.copy_(torch.where(is_bad, copy, tensor))
        rule.found_nonfinite.copy_(torch.where(is_bad, flags | found, found))
        rule.num_skipped_steps.copy_(torch.where(is_bad, num_skipped, rule.num_skipped_steps))


@contextmanager
def all_or_nothing(
    rule: WeightingRule, parameters: Sequence[Tensor], tasks: Sequence[int] = ()
) -> Iterator[Before]:
    """Puts back the state of ``rule`` and the ``.grad`` of ``parameters`` if the body raises, Ctrl-C included.

    In the body ``.grad`` is empty; what was there is added to what the body leaves. A
    FloatingPointError leaves the state as the rule left it: it says that the step does not count.

    Args:
        rule: Whose step it is.
        parameters: All that the passes of the step reach.
        tasks: Those whose rows of the state the body writes.
    """
    before = Before(rule)
    before.keep_rows(tasks)
    saved = [parameter.grad for parameter in parameters]
    if rule.copy_gradients:  # a pass may write where they lie
        saved = copied(saved)
    for parameter in parameters:
        parameter.grad = None
    try:
        yield before
        if any(grad is not None for grad in saved):
            raise_if_reused({BEFORE: saved, THIS_STEP: [each.grad for each in parameters]})
        for index, parameter in enumerate(parameters):
            saved[index] = _sum(saved[index], parameter.grad)
    except FloatingPointError:
        raise
    except BaseException:
        before.restore()
        raise
    finally:
        for parameter, grad in zip(parameters, saved, strict=True):
            parameter.grad = grad


def _sum(grad: Tensor | None, added: Tensor | None) -> Tensor | None:
    if grad is None or added is None:
        return added if grad is None else grad
    return grad + added if grad.is_sparse and not added.is_sparse else grad.add_(added)
