"""What a probe is: a mode, a kind of graph, options and the events of a few steps, drawn from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from _probe_world import GRAPHS

MODES = (
    *("backward", "scalar", "streaming", "given lists", "given matrix", "batched", "features"),
    *("split", "subset", "rotation", "rotation of a subset"),
)
ONE_PASS = ("features", "split", "subset", "rotation", "rotation of a subset")
"""Modes that weigh all tasks in one pass."""

WHOLE_STEP = ("nan", "inf", "interrupt", "error", "hold")
"""Events of which a step has one at most: what a step is."""

EVENTS = (
    *WHOLE_STEP,
    *(
        "zero",
        "no labels",
        "absent",
        "alone",
        "nobody",
        "unit",
        "keep grad",
        "loss scale",
        "freeze",
    ),
    *("save", "safetensors", "deepcopy", "pickle", "peek", "validate"),
)


@dataclass(frozen=True)
class Probe:
    """One drawn run."""

    seed: int
    mode: str
    graph: str
    num_tasks: int
    dtype: torch.dtype
    options: dict[str, Any]
    late: int | None
    events: list[dict[str, int]] = field(default_factory=list)
    """Per step, the events and the tasks that they strike."""


def drawn(seed: int) -> Probe:
    """Draws a probe."""
    draw = random.Random(seed)
    mode, graph = draw.choice(MODES), draw.choice(GRAPHS)
    if graph == "compiled" and draw.random() < 0.7:  # slow
        graph = "plain"
    if mode == "split" and graph in ("tied", "one tensor"):
        graph = "plain"  # a path past the features that nobody weighs; an absence that no gradient tells
    if mode.startswith("given") and graph in ("reentrant", "hidden function"):
        graph = "plain"  # their gradients are nothing that torch.autograd.grad could give
    num_tasks = draw.choice((1, 2, 3, 3, 4, 5))
    if mode.startswith("rotation"):
        num_tasks = max(num_tasks, 2)
    num_steps = draw.randrange(3, 9)
    events = []
    for _ in range(num_steps):
        names = draw.sample(EVENTS, draw.choice((0, 1, 1, 2, 3)))
        while len(set(names) & set(WHOLE_STEP)) > 1:
            names.remove(next(name for name in names if name in WHOLE_STEP))
        events.append({name: draw.randrange(num_tasks) for name in names})
    return Probe(
        seed=seed,
        mode=mode,
        graph=graph,
        num_tasks=num_tasks,
        dtype=draw.choice((torch.float64, torch.float64, torch.float32)),
        options=_drawn_options(draw, mode, num_tasks),
        late=draw.randrange(num_steps) if draw.random() < 0.3 else None,
        events=events,
    )


def _drawn_options(draw: random.Random, mode: str, num_tasks: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if draw.random() < 0.5:
        options["robust_step_size"] = draw.choice((0.01, 0.3, 1.0))
        options["fisher"] = draw.choice(("sqrt", "linear"))
        options["gradient_momentum"] = draw.choice((0.0, 0.9, 0.98))
        options["eps"] = draw.choice((1e-7, 2.0**-126))
    else:
        options["max_log_ratio"] = draw.choice((0.2, 0.7, 3.0))
        options["gradient_momentum"] = draw.choice((0.5, 0.9, 0.98))
    options["combine"] = draw.choice((None, None, "sum"))
    options["num_warmup_steps"] = draw.choice((1, 1, 0, 2, 3))
    options["weight_scale"] = draw.choice(("simplex", "num_tasks"))
    if mode != "split":
        options["head_weighting"] = draw.choice(("none", "none", "task_weights"))
    options["min_weight"] = draw.choice((0.0, 0.0, 0.1 / num_tasks))
    options["update_every"] = draw.choice((1, 1, 1, 2, 3))
    if draw.random() < 0.25:
        options["priorities"] = [draw.choice((1.0, 2.0, 5.0)) for _ in range(num_tasks)]
    options["nonfinite"] = draw.choice(("skip", "skip", "raise"))
    if mode.startswith("rotation"):
        options["tasks_per_step"] = draw.randrange(1, num_tasks)
    if mode == "batched":
        options["batched"] = draw.choice(("auto", True))
    if mode in ("backward", "scalar", "streaming"):
        options["batched"] = draw.choice((False, False, "stacked"))
    return options
