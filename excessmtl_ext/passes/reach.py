"""Which tasks' losses reach which parameters, read off the graphs; runs no backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from excessmtl_ext.passes.hidden import described, hidden_parameters, hides_parameters
from excessmtl_ext.step import Root, input_metadata_of

MOST_PARTINGS = 32
"""Places that are compared with each parameter; each costs a walk over the graph."""


class Parting(NamedTuple):
    """A value that several tasks depend on, and from which some go on alone."""

    shape: tuple[int, ...]
    node: str
    """Name of the node that computed it."""
    tasks: int
    """Bits of the tasks that go on alone."""


class TaskReach:
    """What the losses of one forward pass depend on; holds no graph.

    Sets of tasks are integers with bit t for task t.

    Args:
        roots: One per task, None where absent.

    Attributes:
        present: The tasks that have a loss.
        parameters: Every parameter that some loss reaches, by id.
        tasks: Of each of them, the tasks that reach it, by id.
        partings: Where tasks part.
        behind: Of some parameters, by id: tasks that part from the others before the parameter is used, and reach it
            all the same, as where one task's head reads another's output.

    Raises:
        ValueError: a node hides the parameters below it, or holds those of several tasks in one.
    """

    def __init__(self, roots: Sequence[Root | None]) -> None:
        self.present = 0
        self.parameters: dict[int, Tensor] = {}
        self.tasks: dict[int, int] = {}
        starts: list[tuple[Node, int, int]] = []
        for task, root in enumerate(roots):
            if root is None:
                continue
            self.present |= 1 << task
            if not isinstance(root, Tensor):
                starts.append((root.node, root.output_nr, 1 << task))
            elif root.grad_fn is not None:
                starts.append((root.grad_fn, root.output_nr, 1 << task))
            else:
                self._add([root], 1 << task)
        graph = _Graph(starts)
        holders: dict[Node, list[Tensor]] = {}
        for node, tasks in graph.tasks.items():
            found = _parameters_at(node, graph.edges[node])
            if found:
                holders[node] = found
                self._add(found, tasks)
        graph.raise_if_merged(holders)
        self.partings, self.behind = _partings(graph, holders)

    def _add(self, parameters: Iterable[Tensor], tasks: int) -> None:
        for parameter in parameters:
            self.parameters[id(parameter)] = parameter
            self.tasks[id(parameter)] = self.tasks.get(id(parameter), 0) | tasks


def _parameters_at(node: Node, edges: Sequence[tuple[Node | None, int]]) -> list[Tensor]:
    variable = None if edges else getattr(node, "variable", None)
    if variable is not None:
        return [variable]
    if not (edges and isinstance(node, BackwardCFunction) and hides_parameters(node)):
        return []
    found = hidden_parameters(node)
    if found is None:
        raise ValueError(
            "Expected graphs whose parameters can be seen, as those that tasks share are looked up there, but "
            f"{described(node)} hides the ones below it. Call checkpoint with use_reentrant=False, or give the "
            "balancer the shared parameters: model.encoder.parameters()."
        )
    return found


class _Graph:
    """The graph of all losses, with the tasks at every node.

    Attributes:
        edges: Of each node, those to what it hands gradients to.
        tasks: Bits of the tasks whose pass comes through a node.
        by_output: The same for each output that is used.
    """

    def __init__(self, starts: Sequence[tuple[Node, int, int]]) -> None:
        self.edges: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        waits_for: dict[Node, int] = {}
        stack = list({node for node, _, _ in starts})
        while stack:
            node = stack.pop()
            if node in self.edges:
                continue
            self.edges[node] = node.next_functions
            for parent, _ in self.edges[node]:
                if parent is not None:
                    waits_for[parent] = waits_for.get(parent, 0) + 1
                    stack.append(parent)
        self.tasks: dict[Node, int] = dict.fromkeys(self.edges, 0)
        self.by_output: dict[Node, dict[int, int]] = {node: {} for node in self.edges}
        for node, output_nr, task in starts:
            self._arrive(node, output_nr, task)
        ready = [node for node in self.edges if not waits_for.get(node)]
        while ready:
            node = ready.pop()
            for position, (parent, output_nr) in enumerate(self.edges[node]):
                if parent is None:
                    continue
                self._arrive(parent, output_nr, self.through(node, position))
                waits_for[parent] -= 1
                if not waits_for[parent]:
                    ready.append(parent)

    def _arrive(self, node: Node, output_nr: int, tasks: int) -> None:
        self.tasks[node] |= tasks
        outputs = self.by_output[node]
        outputs[output_nr] = outputs.get(output_nr, 0) | tasks

    def through(self, node: Node, position: int) -> int:
        """Returns the tasks that go on along an edge."""
        if hasattr(
            node, "ddp_weakref"
        ):  # DistributedDataParallel's: the identity, an edge per output
            return self.by_output[node].get(position, 0)
        return self.tasks[node]

    def raise_if_merged(self, holders: dict[Node, list[Tensor]]) -> None:
        """Raises ValueError where one compiled node holds the parameters of several tasks' outputs."""
        for node, outputs in self.by_output.items():
            if (
                type(node).__name__ == "CompiledFunctionBackward"
                and len(set(outputs.values())) > 1
                and any(parent in holders for parent, _ in self.edges[node] if parent is not None)
            ):
                raise ValueError(
                    "Expected graphs that tell whose a parameter is, but torch.compile has made one node of what "
                    "several tasks use. Compile encoder and heads by themselves, call balancer.prepare(losses) with "
                    "losses of the model before it is compiled, or give the balancer the shared parameters: "
                    "model.encoder.parameters()."
                )

    def below(self, node: Node) -> set[Node]:
        """Returns ``node`` and what it hands gradients on to."""
        parents = {
            each: [parent for parent, _ in edges if parent is not None]
            for each, edges in self.edges.items()
        }
        return _closure([node], parents)


def _partings(
    graph: _Graph, holders: dict[Node, list[Tensor]]
) -> tuple[list[Parting], dict[int, int]]:
    children_of: dict[Node, list[Node]] = {}
    leaving: dict[tuple[Node, int], int] = {}
    for node, edges in graph.edges.items():
        for position, (parent, output_nr) in enumerate(edges):
            if parent is None:
                continue
            children_of.setdefault(parent, []).append(node)
            alone = graph.through(node, position)
            if alone.bit_count() == 1 < graph.tasks[parent].bit_count() and parent not in holders:
                place = (parent, output_nr)
                leaving[place] = leaving.get(place, 0) | alone
    trains = _closure(holders, children_of)
    leaving = {place: tasks for place, tasks in leaving.items() if place[0] in trains}
    shared = {node: each for node, each in holders.items() if graph.tasks[node].bit_count() > 1}
    uses = {node: _uses(node, graph, children_of, trains) for node in shared} if leaving else {}
    behind: dict[int, int] = {}
    for (place, _), tasks in list(leaving.items())[:MOST_PARTINGS]:
        above = _closure([place], children_of) - {place}
        below = graph.below(place)
        for node, parameters in shared.items():
            alone = tasks & graph.tasks[node]
            is_behind = node not in below and not above.isdisjoint(uses[node])
            if is_behind and alone not in (0, graph.tasks[node]):
                for parameter in parameters:
                    behind[id(parameter)] = behind.get(id(parameter), 0) | alone
    partings: dict[tuple[tuple[int, ...], str], int] = {}
    for (node, output_nr), tasks in leaving.items():
        kind = (tuple(input_metadata_of(node)[output_nr].shape), node.name())
        partings[kind] = partings.get(kind, 0) | tasks
    return [Parting(*kind, tasks) for kind, tasks in partings.items()], behind


def _uses(
    holder: Node, graph: _Graph, children_of: dict[Node, list[Node]], trains: set[Node]
) -> list[Node]:
    """Returns the nodes where a parameter meets a value that depends on another one, as a layer's product does."""
    found: list[Node] = []
    stack, seen = [holder], {holder}
    while stack:
        for child in children_of.get(stack.pop(), ()):
            if child in seen:
                continue
            seen.add(child)
            if len({parent for parent, _ in graph.edges[child] if parent in trains}) > 1:
                found.append(child)
            else:
                stack.append(child)
    return found


def _closure(starts: Iterable[Node], next_of: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """Returns ``starts`` and every node that a way leads to."""
    stack = list(starts)
    found = set(stack)
    while stack:
        for node in next_of.get(stack.pop(), ()):
            if node not in found:
                found.add(node)
                stack.append(node)
    return found
