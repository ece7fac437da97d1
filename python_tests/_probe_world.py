"""A small network in several kinds of graph, for drawn probes: what trains, and a plain twin in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

GRAPHS = (
    *("plain", "reentrant", "checkpoint", "function", "hidden function", "one tensor"),
    *("tied", "frozen", "sparse head", "sparse shared", "shared head", "compiled"),
)
REFUSABLE = ("reentrant", "hidden function", "sparse shared", "compiled")
"""Graphs for which a mode may raise ValueError, if nothing has changed then."""

INPUTS, HIDDEN, FEATURES, ROWS, WORDS = 5, 6, 4, 7, 9


class OwnLinear(torch.autograd.Function):
    """A linear layer whose backward pass is written by hand."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ inputs, grads[0].sum(0)


class HiddenLinear(torch.autograd.Function):
    """A layer that runs a backward pass of its own, so that its parameters have no edge in the graph."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs)
        return layer(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        inputs = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.layer(inputs)
        torch.autograd.backward(outputs, grads[0])
        assert inputs.grad is not None
        return inputs.grad, None


class SpoiledGradient(torch.autograd.Function):
    """The input as it is, with one element of its gradient replaced."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, value: float) -> Tensor:
        ctx.value = value
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        spoiled = grads[0].clone()
        spoiled.view(-1)[1] = ctx.value
        return spoiled, None


class Net(nn.Module):
    """Two layers that all tasks share, and a head per task.

    Args:
        num_tasks: T.
        graph: One of ``GRAPHS``.
    """

    def __init__(self, num_tasks: int, graph: str) -> None:
        super().__init__()
        self.graph = graph
        self.words = nn.Embedding(WORDS, INPUTS, sparse=graph == "sparse shared")
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.second = nn.Linear(HIDDEN, FEATURES)
        self.heads = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in range(num_tasks))
        self.head_words = nn.Embedding(WORDS, FEATURES, sparse=graph == "sparse head")
        if graph == "shared head" and num_tasks > 1:
            self.heads[1] = self.heads[0]
        if graph == "frozen":
            self.first.bias.requires_grad_(False)
        self.compiled: Any = None

    def shared(self) -> list[Tensor]:
        """Returns what all tasks share: the embedding of words only where its gradients are sparse."""
        words = [self.words.weight] if self.graph == "sparse shared" else []
        return [*words, *self.first.parameters(), *self.second.parameters()]

    def used(self) -> list[Tensor]:
        """Returns every parameter once, shared ones first."""
        found = {id(each): each for each in self.shared()}
        for each in (*self.heads.parameters(), self.head_words.weight):
            found.setdefault(id(each), each)
        return list(found.values())

    def encode(self, inputs: Tensor, words: Tensor, *, is_plain: bool = False) -> Tensor:
        """Returns the features [N, C]."""
        graph = "plain" if is_plain else self.graph
        if self.graph == "sparse shared":
            inputs = inputs + self.words(words)
        if graph == "compiled":
            if self.compiled is None:
                torch._dynamo.reset()  # the graphs of other probes count towards a limit
                self.compiled = torch.compile(_two_layers, backend="aot_eager")
            return self.compiled(
                inputs, self.first.weight, self.first.bias, self.second.weight, self.second.bias
            )
        hidden = self.first(inputs).tanh()
        if graph in ("reentrant", "checkpoint"):
            z = checkpoint(self.second, hidden, use_reentrant=graph == "reentrant")
        elif graph == "function":
            z = OwnLinear.apply(hidden, self.second.weight, self.second.bias)
        elif graph == "hidden function":
            z = HiddenLinear.apply(hidden, self.second)
        else:
            z = self.second(hidden)
        return z.tanh()

    def outputs(self, copies: list[Tensor], words: Tensor) -> list[Tensor]:
        """Returns T outputs [N] from the features of each task."""
        outs = []
        for task, (head, z) in enumerate(zip(self.heads, copies, strict=True)):
            if task == 0 and self.graph == "sparse head":
                z = z + self.head_words(words)
            out = head(z)[:, 0]
            if task == 0 and self.graph == "tied":
                out = out + linear(z, self.second.weight[:, :1].T)[:, 0]
            outs.append(out)
        if self.graph == "one tensor":
            return list(torch.stack(outs).unbind())
        return outs


def _two_layers(inputs: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return linear(linear(inputs, a, b).tanh(), c, d).tanh()


def batch(seed: int, num_tasks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs [N, 5], words [N] and targets [T, N]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)
    words = torch.randint(WORDS, (ROWS,), generator=generator)
    targets = torch.randn(num_tasks, ROWS, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), words, targets.to(dtype)


def twin_of(net: Net) -> Net:
    """Returns a copy in float64 with dense gradients, for the gradients by hand."""
    compiled, net.compiled = net.compiled, None
    twin = copy.deepcopy(net).double()
    net.compiled = compiled
    for each in (twin.words, twin.head_words):
        each.sparse = False
    for parameter, of_net in zip(twin.used(), net.used(), strict=True):
        parameter.grad = None
        parameter.requires_grad_(of_net.requires_grad)
    return twin
