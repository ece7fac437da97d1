"""The search for the parameters of a model that at least two tasks reach, and what it found in words."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from excessmtl_ext.arguments import checked_parameters, stacklevel_of_caller, trainable
from excessmtl_ext.distributed.dtensors import unsharded_parameters
from excessmtl_ext.passes.reach import Parting, TaskReach

MOST_SHOWN = 6
"""Entries of a list that the text shows."""


class SharedSearch:
    """Collects from the graphs of losses which tasks reach which parameters of a model.

    It also observes the steps after it: a parameter that no loss reached may be reached later.

    Args:
        module: The model, or a part of it that holds all that tasks share.
        num_tasks: T.

    Attributes:
        candidates: Parameters of the model that train, in its order.
        described: Names and sizes of all of its parameters, which are equal on all ranks.
        present: Bits of the tasks that had a loss so far.
    """

    period = 1
    wants_gradients = False

    def __init__(self, module: nn.Module, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        given = checked_parameters(module.parameters(), "model.parameters()")
        self.candidates = trainable(given, "model.parameters()")
        self.present = 0
        self.partings: list[Parting] = []
        self._module: nn.Module | None = module
        self._tasks: dict[int, int] = {}
        self._behind: dict[int, int] = {}
        self._outside: dict[int, Tensor] = {}
        self._names: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        self._unreached: dict[str, Tensor] = {}
        self._has_warned = False

    @property
    def described(self) -> list[tuple[str, int, bool]]:
        return [
            (name, parameter.numel(), parameter.requires_grad)
            for name, parameter in self._named().items()
        ]

    @property
    def num_needed(self) -> int:
        """Tasks that reach a shared parameter, at least."""
        return min(2, self.num_tasks)

    def _named(self) -> dict[str, Tensor]:
        if self._module is None:
            return self._names
        stands_for = unsharded_parameters(
            self._module
        )  # between the passes a model may show either
        return {
            name: stands_for.get(id(each), each) for name, each in self._module.named_parameters()
        }

    # ---- evidence

    def take(self, reach: TaskReach, *, is_whole: bool = False) -> None:
        """Adds what the losses of one forward pass reach.

        Raises:
            ValueError: the losses reach parameters that are not the model's, and ``is_whole`` says that none may be.
        """
        assert self._module is not None
        own = set(map(id, self._named().values()))
        stands_for = unsharded_parameters(self._module)
        reached = {key: stands_for.get(key, each) for key, each in reach.parameters.items()}
        outside = {id(each): each for each in reached.values() if id(each) not in own}
        if is_whole and outside:
            raise ValueError(
                "Expected the whole model with several ranks, whose heads are averaged, too, but the losses reach "
                f"{len(outside)} parameters that are not in it, of shapes "
                f"{_listed([list(each.shape) for each in outside.values()])}. Give the balancer the model that holds "
                "all of them."
            )
        self.present |= reach.present
        self.partings = list(dict.fromkeys([*self.partings, *reach.partings]))
        self._outside |= outside
        for key, parameter in reached.items():
            _add(self._tasks, parameter, reach.tasks[key])
            _add(self._behind, parameter, reach.behind.get(key, 0))

    def tasks_of_all(self) -> tuple[int, list[int]]:
        """Returns the present tasks, and those of each parameter in the order of the model, as bits."""
        return self.present, [self._tasks.get(id(each), 0) for each in self._named().values()]

    def put_tasks(self, present: int, tasks: Sequence[int]) -> None:
        """Replaces the evidence by that of all ranks."""
        self.present = present
        self._tasks.update(zip(map(id, self._named().values()), tasks, strict=True))

    def undecided(self) -> list[str]:
        """Names the parameters that may or may not be shared, as some tasks had no loss yet."""
        num_absent = self.num_tasks - self.present.bit_count()
        if num_absent == 0:
            return []
        return [
            name
            for name, parameter in self._named().items()
            if parameter.requires_grad
            and (count := self._tasks.get(id(parameter), 0).bit_count()) < self.num_needed
            and count + num_absent >= self.num_needed
        ]

    def shared(self) -> list[Tensor]:
        """Selects the parameters that at least two tasks reach, in the order of the model.

        Raises:
            ValueError: there is none, or absent tasks may share more.
        """
        undecided = self.undecided()
        if undecided:
            absent = [task for task in range(self.num_tasks) if not self.present >> task & 1]
            raise ValueError(
                f"Expected losses of all tasks, to find which parameters they share, but task(s) {_listed(absent)} "
                f"had none so far, so that {_condensed(undecided, self._trainable_names())} cannot be told. Call "
                "balancer.prepare(losses) before the first step, with a loss of every task, or once for each task; "
                "or give the balancer the shared parameters: model.encoder.parameters()."
            )
        found = [each for each in self._named().values() if self._is_shared(each)]
        if not found:
            reached = [each for each in self._named().values() if id(each) in self._tasks]
            raise ValueError(
                f"Expected a parameter of the model that {self.num_needed} losses reach, but "
                + (
                    f"each of the {len(reached)} that a loss reaches is reached by that of one task only"
                    if reached
                    else "the losses reach none of its parameters"
                )
                + ". Give the balancer the model that computed the losses; with frozen shared parameters there is "
                "nothing to balance: call sum(losses).backward()."
            )
        return found

    def _is_shared(self, parameter: Tensor) -> bool:
        return self._tasks.get(id(parameter), 0).bit_count() >= self.num_needed

    def conclude(self) -> None:
        """Ends the search: keeps names and lets go of the model."""
        self._names = self._named()
        self._module = None
        self._frozen = {name: p for name, p in self._names.items() if not p.requires_grad}
        self._unreached = {
            name: p
            for name, p in self._names.items()
            if p.requires_grad and id(p) not in self._tasks and p.grad is None
        }

    # ---- later steps

    def has_thawed(self) -> bool:
        """Tells whether a parameter that was frozen when the search ended requires grad now."""
        return any(parameter.requires_grad for parameter in self._frozen.values())

    def check_thawed(self, reach: TaskReach) -> None:
        """Raises ValueError where a parameter that was frozen is shared now; those of one task are no concern."""
        for name, parameter in list(self._frozen.items()):
            tasks = reach.tasks.get(id(parameter), 0)
            if tasks.bit_count() >= self.num_needed:
                raise ValueError(
                    f"Expected `{name}`, of shape {list(parameter.shape)}, to stay frozen as it was when the shared "
                    "parameters were found, but it requires grad now, several tasks reach it, and there is no state "
                    "for it. Make a new balancer; or make it while everything that will ever train requires grad, and "
                    "freeze afterwards."
                )
            if tasks:
                self._tasks[id(parameter)] = tasks
                del self._frozen[name]

    def on_gradients(self, rule: Any, step: Any) -> None:
        """Looks at no gradient."""

    def on_end(self, rule: Any, step: Any, tasks: Sequence[int]) -> None:
        """Warns, once, of a parameter that no loss reached when the search ended, and that has a gradient now."""
        if self._has_warned or not self._unreached:
            return
        late = [name for name, parameter in self._unreached.items() if parameter.grad is not None]
        if late:
            self._has_warned = True
            warnings.warn(
                f"No loss reached {_condensed(late, self._trainable_names())} when the shared parameters were found, "
                "but there is a gradient now. If it comes from the losses of several tasks, it is their plain sum. "
                "Call prepare(losses) while the whole model is in use, or give the balancer the shared parameters.",
                stacklevel=stacklevel_of_caller(),
            )

    def restart(self) -> None:
        """Keeps what was found: it belongs to the model, not to the state."""

    # ---- in words

    def _trainable_names(self) -> list[str]:
        return [name for name, each in self._named().items() if each.requires_grad]

    def text(self, task_names: Sequence[str] | None = None) -> str:
        """Returns what was found and what is odd about it, in a few lines."""
        if self._module is not None:
            seen = _tasks(self.present, task_names)
            so_far = f" So far there were losses of {seen}." if self.present else ""
            return (
                "Shared parameters: to be found from the losses of the first step, or of prepare(losses)."
                + so_far
            )
        names = self._trainable_names()
        shared = [name for name in names if self._is_shared(self._names[name])]
        numel = sum(self._names[name].numel() for name in shared)
        lines = [f"Shared: {_condensed(shared, names)}; {numel:,} elements."]
        if self.partings:
            places = [f"{each.node} {list(each.shape)}" for each in self.partings]
            lines.append(f"Tasks part at: {_listed(places)}.")
        elif self.num_tasks > 1:
            lines.append("Tasks part at: the parameters; each has a forward pass of its own.")
        heads = []
        for task in range(self.num_tasks):
            own = [name for name in names if self._tasks.get(id(self._names[name]), 0) == 1 << task]
            if own and self.num_tasks > 1:
                heads.append(f"{_tasks(1 << task, task_names)} {_condensed(own, names)}")
        if heads:
            lines.append(f"Heads: {_listed(heads, '; ')}.")
        return "\n".join([*lines, *(f"Odd: {each}" for each in self._oddities(names, task_names))])

    def _oddities(self, names: list[str], task_names: Sequence[str] | None) -> Iterable[str]:
        everyone = (1 << self.num_tasks) - 1
        partly: dict[int, list[str]] = {}
        behind: dict[int, list[str]] = {}
        for name in names:
            key = id(self._names[name])
            tasks = self._tasks.get(key, 0)
            if self._behind.get(key) and self._is_shared(self._names[name]):
                behind.setdefault(self._behind[key], []).append(name)
            elif self.num_needed <= tasks.bit_count() and tasks != everyone:
                partly.setdefault(tasks, []).append(name)
        for tasks, found in behind.items():
            yield (
                f"{_condensed(found, names)} is used after {_tasks(tasks, task_names)} parted from the others, and "
                "reached by it all the same, as a head's layer whose output another head reads. It is balanced as "
                "shared; if it is a head's, give the balancer the shared parameters."
            )
        for tasks, found in partly.items():
            yield (f"{_condensed(found, names)} is shared by {_tasks(tasks, task_names)} only.")
        if self._outside:
            several = [key for key in self._outside if self._tasks[key].bit_count() > 1]
            if several:
                yield (
                    f"{len(several)} parameters outside the model are reached by several tasks; they get the plain "
                    "sum of their gradients."
                )
        unreached = [name for name in names if id(self._names[name]) not in self._tasks]
        if unreached:
            yield f"{_condensed(unreached, names)} is reached by no loss."
        frozen = [name for name, each in self._names.items() if not each.requires_grad]
        if frozen:
            yield (
                f"{_condensed(frozen, list(self._names))} is frozen, "
                f"{sum(self._names[name].numel() for name in frozen):,} elements, and has no state."
            )


def _add(sets: dict[int, int], parameter: Tensor, tasks: int) -> None:
    sets[id(parameter)] = sets.get(id(parameter), 0) | tasks


def _tasks(bits: int, task_names: Sequence[str] | None) -> str:
    tasks = [task for task in range(bits.bit_length()) if bits >> task & 1]
    if task_names is not None:
        return _listed([task_names[task] for task in tasks])
    return f"{'task' if len(tasks) == 1 else 'tasks'} {_listed(tasks)}"


def _listed(entries: Sequence[object], between: str = ", ") -> str:
    shown = between.join(map(str, entries[:MOST_SHOWN]))
    return f"{shown}{between}... ({len(entries)} in all)" if len(entries) > MOST_SHOWN else shown


def _condensed(names: Sequence[str], among: Sequence[str]) -> str:
    """Lists names of parameters, those of a whole module in one: ``encoder (4 parameters)``."""
    chosen = set(names)
    groups: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            inside = [n for n in among if n == prefix or n.startswith(prefix + ".")]
            if chosen.issuperset(inside):
                groups.setdefault(prefix, len(inside))
                break
    return _listed(
        [prefix if num == 1 else f"{prefix} ({num} parameters)" for prefix, num in groups.items()]
    )
