"""Weight gradients of deep convolutions, computed beside the passes from an input that is unfolded once for all tasks.

A convolution's weight gradient is one matrix product: the gradient of the output, [O, N], times the unfolded input,
[N, C K], for N output positions of the batch, C K inputs of one position and O channels. Where N is small beside C K,
as behind the last stages of an image network, the library's own kernel takes several times as long as that product;
and the unfolded input is the same for every task.

So the passes leave these weights out (``inputs=``) and go on computing everything else. A hook in front of the layer's
node reads the gradient of its output, after all other hooks have seen it, and makes the product. A weight that is used
in any way but this one keeps the ordinary pass; what was decided about each is kept to be printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.functional import unfold

from excessmtl_ext.passes.hidden import hides_parameters
from excessmtl_ext.step import Root, input_metadata_of

LEAST_RATIO = 4
"""C K / N from which on the product is taken: below it both kernels take equally long or the library's is faster.

A fixed rule about shapes, and no measurement of the run, so that a resumed run takes the same kernels.
"""

_MISSING = object()


@dataclass
class Decisions:
    """What was decided about the weights of the latest step.

    Attributes:
        num_stacked: Weights whose gradients come from the shared unfolded input.
        reasons: How many of the others take ordinary passes, by reason.
    """

    num_stacked: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        total = self.num_stacked + sum(self.reasons.values())
        told = [f"{self.num_stacked} of {total} weight gradients from inputs unfolded once"]
        return "; ".join(told + [f"{number} {why}" for why, number in self.reasons.most_common()])


class _Layer:
    """A convolution whose weight gradient is computed here.

    Args:
        node: Of the graph.
        weight: The weight, a leaf.
        index: Which shared parameter it is.
    """

    def __init__(self, node: Any, weight: Tensor, index: int) -> None:
        self.node = node
        self.weight = weight
        self.index = index
        self.grad: Tensor | None = None
        self._columns: Tensor | None = None

    def look(self, grad_outputs: Sequence[Tensor | None]) -> None:
        """Takes the gradient of the layer's output: the hook in front of its node."""
        grad = grad_outputs[0]
        if grad is None:
            return
        if self._columns is None:
            self._columns = self._unfolded()
        rows = grad.transpose(0, 1).reshape(self.weight.shape[0], -1)
        self.grad = torch.mm(rows, self._columns).view(self.weight.shape)

    def _unfolded(self) -> Tensor:
        """Returns [N, C K]: the inputs behind every output position."""
        node, kernel = self.node, self.weight.shape[2:]
        inputs = node._saved_input.detach()
        is_line = len(kernel) == 1
        blocks = unfold(
            inputs.unsqueeze(2) if is_line else inputs,
            (1, *kernel) if is_line else tuple(kernel),
            dilation=(1, *node._saved_dilation) if is_line else node._saved_dilation,
            padding=(0, *node._saved_padding) if is_line else node._saved_padding,
            stride=(1, *node._saved_stride) if is_line else node._saved_stride,
        )
        return blocks.transpose(0, 1).reshape(blocks.shape[1], -1).t()


class StackedLayers:
    """The convolutions of a step whose weight gradients are computed beside its passes; a context around these.

    Args:
        roots: Where the passes start.
        shared: The L shared parameters.

    Attributes:
        decisions: About each weight.
        left_out: Ids of the weights of ``layers``.
        inputs: What the passes accumulate into: every leaf but the weights of ``layers``; None: every leaf.
        layers: Those found.
    """

    def __init__(self, roots: Iterable[Root], shared: Sequence[Tensor]) -> None:
        self.decisions = Decisions()
        self.left_out: frozenset[int] = frozenset()
        self.inputs: list[Tensor] | None = None
        self.layers: list[_Layer] = []
        self._handles: list[Any] = []
        self._find(list(roots), {id(each): index for index, each in enumerate(shared)})

    def __enter__(self) -> StackedLayers:
        self._handles = [layer.node.register_prehook(layer.look) for layer in self.layers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.layers = []

    def fill(self, grads: list[Tensor | None]) -> None:
        """Puts the weight gradients of the pass that has just ended where they belong among the shared ones."""
        for layer in self.layers:
            grads[layer.index], layer.grad = layer.grad, None

    def _find(self, roots: Sequence[Root], index_of: dict[int, int]) -> None:
        graph = _Graph(roots)
        obstacle = graph.obstacle
        if torch.compiler.is_compiling():
            obstacle = "while a compiler traces"
        for node, variable in graph.leaves.items():
            index = index_of.get(id(variable))
            if index is None or variable.dim() < 2:
                continue
            users = graph.users[node]
            why = obstacle or _why_ordinary(users, node, variable)
            if why is None:
                self.layers.append(_Layer(users[0], variable, index))
                self.decisions.num_stacked += 1
            else:
                self.decisions.reasons[why] += 1
        left_out = self.left_out = frozenset(id(layer.weight) for layer in self.layers)
        left = {node: leaf for node, leaf in graph.leaves.items() if id(leaf) not in left_out}
        if not all(_leads_to(left, layer.node.next_functions[0][0]) for layer in self.layers):
            self.decisions.reasons["of layers that no pass visits"] += self.decisions.num_stacked
            self.decisions.num_stacked = 0
            self.layers, self.left_out = [], frozenset()
        if self.layers:
            self.inputs = list(left.values())


class _Graph:
    """What the passes visit.

    Args:
        roots: Where they start.

    Attributes:
        leaves: The leaf of each node that accumulates.
        users: The nodes that hand such a node a gradient, one for each edge.
        obstacle: Why no pass may name the leaves it accumulates into; or None.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        self.leaves: dict[Node, Tensor] = {}
        self.users: dict[Node, list[Node]] = {}
        self.obstacle: str | None = None
        starts = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
        stack = list({node: None for node in starts if node is not None})
        if None in starts or any(not node.next_functions for node in stack):
            self.obstacle = "as a pass starts at a parameter"
        seen = set(stack)
        while stack:
            node = stack.pop()
            if isinstance(node, BackwardCFunction) and hides_parameters(node):
                self.obstacle = "as a node runs a backward pass of its own"
            edges = node.next_functions
            for parent, _ in edges:
                if parent is None:
                    continue
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
                if parent in self.leaves:
                    self.users[parent].append(node)
                elif not parent.next_functions:
                    variable = getattr(parent, "variable", None)
                    if variable is not None:
                        self.leaves[parent] = variable
                        self.users[parent] = [node]
        if not all(leaf.requires_grad for leaf in self.leaves.values()):
            self.obstacle = "as a parameter was frozen after the forward pass"


def _leads_to(leaves: Mapping[Node, Tensor], start: Node | None) -> bool:
    """Tells whether a pass that accumulates into ``leaves`` only hands a gradient to ``start``."""
    stack = [start]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node in leaves:
            return True
        for parent, _ in () if node is None else node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return False


def _why_ordinary(users: Sequence[Any], leaf: Node, weight: Tensor) -> str | None:
    """Says why the gradient of ``weight`` comes from the pass itself; None if it is computed here."""
    if len(users) > 1:
        return "used more than once"
    (node,) = users
    edges = node.next_functions
    if type(node).__name__ != "ConvolutionBackward0" or len(edges) < 2 or edges[1][0] is not leaf:
        return "of no convolution, or cast or computed on the way to one"
    if edges[0][0] is None:
        # Nothing else would make the pass come here.
        return "of a layer whose input needs no gradient"
    if getattr(weight, "_backward_hooks", None) or getattr(
        weight, "_post_accumulate_grad_hooks", None
    ):
        return "with a hook"
    output = input_metadata_of(node)[0]
    if not _is_plain(weight, output):
        return "of another device, dtype or layout"
    if getattr(node._raw_saved_input, "unpack_hook", _MISSING) is not None:
        return "whose input is recomputed or kept elsewhere (a checkpoint, for one)"
    if node._saved_transposed or node._saved_groups != 1:
        return "transposed or in groups"
    positions = output.shape[0] * prod(output.shape[2:])
    if positions * LEAST_RATIO > prod(weight.shape[1:]):
        return "with too many output positions to gain"
    return None


def _is_plain(weight: Tensor, output: Any) -> bool:
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.dim() in (3, 4)
        and weight.is_contiguous()
        and weight.dtype in (torch.float32, torch.float64)
        and output.dtype == weight.dtype
    )


Stacker = Callable[[Iterable[Root], Sequence[Tensor]], StackedLayers]
"""Makes the :class:`StackedLayers` of some passes."""
