"""Drawn probes of the other methods: what their weights do to gradients, and what no event may change.

The weights of those with an equation of one line are compared with it in float64; those of all others are taken as
they are, and the gradients compared with the sum under them.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
from _by_hand import Row
from _probe_draw import Probe, drawn
from _probe_world import twin_of
from _probes import Run
from torch import Tensor

from excessmtl_ext import (
    FAMO,
    IMTL,
    MGDA,
    Balancer,
    DynamicWeightAverage,
    FixedWeights,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)

STEP_SIZE = 0.3
METHODS: dict[str, Any] = {
    "uniform": Uniform,
    "fixed": lambda p, **o: FixedWeights(p, weights=[1.0 + i for i in range(o["num_tasks"])], **o),
    "group_dro": lambda p, **o: GroupDRO(p, robust_step_size=STEP_SIZE, **o),
    "inverse_norm": InverseNorm,
    "gradnorm": GradNorm,
    "mgda": MGDA,
    "imtl_g": lambda p, **o: IMTL(p, variant="G", **o),
    "imtl_l": lambda p, **o: IMTL(p, variant="L", **o),
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
    "stch": SmoothTchebycheff,
}
SEES_GRADIENTS = ("inverse_norm", "gradnorm", "mgda", "imtl_g")
HAS_NO_MEMORY = ("mgda", "imtl_g")
"""A task that takes no part holds 1 / T there, and keeps its weight under the others."""


def drawn_baseline(seed: int) -> tuple[str, Probe]:
    """Draws a method, and a probe of it."""
    draw = random.Random(f"baseline {seed}")
    method = draw.choice(list(METHODS))
    modes = ["backward", "scalar"]
    modes += ["batched"] if method in SEES_GRADIENTS else ["streaming"]
    probe = drawn(seed)
    options = {
        "weight_scale": draw.choice(("simplex", "num_tasks")),
        "head_weighting": draw.choice(("none", "none", "task_weights")),
        "nonfinite": draw.choice(("skip", "raise")),
    }
    mode = draw.choice(modes)
    if mode == "batched":
        options["batched"] = True
    steps = []
    for events in probe.events:
        kept = dict(events)
        if method not in SEES_GRADIENTS:
            kept.pop("nan", None)
            kept.pop("inf", None)
        steps.append(kept)
    return method, replace(probe, mode=mode, options=options, events=steps)


class BaselineRun(Run):
    """A probe of another method under way."""

    def __init__(self, method: str, probe: Probe) -> None:
        self.method = method
        super().__init__(replace(probe, options={**probe.options, "update_every": 1}))
        self.events: dict[str, int] = {}
        self.values: list[Tensor | None] = []

    def made(self) -> Balancer:
        """Returns a balancer of the method."""
        options = {
            name: value for name, value in self.probe.options.items() if name != "update_every"
        }
        return METHODS[self.method](self.net.shared(), num_tasks=self.probe.num_tasks, **options)

    def by_hand(
        self, number: int, present: list[int], events: dict[str, int]
    ) -> tuple[list[Row | None], list[Row | None]]:
        """Notes the losses, too: weights may follow from them."""
        self.events = events
        _, self.values, _ = self.forward(number, present, events, net=twin_of(self.net))
        self.before = self.balancer.task_weights.clone()
        return super().by_hand(number, present, events)

    def by_hand_from_the_start(self) -> None:
        """Returns nothing: see :meth:`compare_move`."""

    def wrong_calls(self, losses: list[Any], first: Tensor) -> list[Any]:
        return super().wrong_calls(losses, first)[:3]

    def advance(
        self, present: list[int], estimate: list[Row | None], *, moves: bool
    ) -> tuple[list[list[float]], list[float]]:
        """Returns the factors of the balancer's weights, after a look at these."""
        weights = self.balancer.task_weights.tolist()
        if moves:
            self.compare_move(self.part(present, estimate), estimate)
        else:
            assert torch.equal(self.balancer.task_weights, self.before)
        head_weights = self.balancer.head_weights().tolist()
        return [[weight] * len(self.given()) for weight in weights], head_weights

    def part(self, present: list[int], estimate: list[Row | None]) -> list[int]:
        """Returns the tasks that take part: neither without labels nor, for some methods, without gradient."""
        return [
            task
            for task in present
            if self.events.get("no labels") != task
            and not (self.method in SEES_GRADIENTS and _norm(estimate[task]) == 0.0)
        ]

    def compare_move(self, part: list[int], estimate: list[Row | None]) -> None:
        """Asserts what is known of the new weights."""
        weights, total = self.balancer.task_weights, self.balancer.weight_total
        assert bool(weights.isfinite().all())
        assert abs(float(weights.sum()) - total) < 1e-9 * total
        if self.method in HAS_NO_MEMORY:
            return
        for task in set(range(self.probe.num_tasks)).difference(part):
            assert abs(float(weights[task] - self.before[task])) < 1e-9 * total
        moved = {}
        for task in part:
            before = float(self.before[task])
            loss = self.values[task]
            if self.method in ("uniform", "fixed"):
                moved[task] = math.log(before)
            elif self.method == "group_dro" and before > 1e-280:
                assert loss is not None
                moved[task] = math.log(before) + STEP_SIZE * float(loss)
            elif self.method == "inverse_norm":
                moved[task] = -math.log(_norm(estimate[task]))
        if not moved or len(moved) < len(part):
            return
        had = float(self.before[part].sum())
        shares = torch.tensor(list(moved.values()), dtype=torch.float64).softmax(0) * had
        tolerance = 1e-8 if self.probe.dtype == torch.float64 else 2e-3
        torch.testing.assert_close(weights[part], shares, rtol=tolerance, atol=1e-12)

    def compare_weights(self) -> None:
        assert self.balancer.num_calls == self.calls


def _norm(row: Row | None) -> float:
    return math.sqrt(sum(float(grad.square().sum()) for grad in row or [] if grad is not None))
