"""Counts how often one step changes file within the package: what a reader meets on the way from losses to ``.grad``.

    python bench/step_trace.py
    python bench/step_trace.py plain --show

A change is a call or a return from one file of the package into another. The step is the sixth of a balancer on a small
network with three tasks, in the published setting or, with ``--default``, in the default one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import excessmtl_ext
from excessmtl_ext import ExcessMTL

PACKAGE = Path(excessmtl_ext.__file__).parent
NUM_TASKS = 3
PUBLISHED: dict[str, Any] = {
    "robust_step_size": 0.01,
    "combine": "sum",
    "fisher": "sqrt",
    "eps": 1e-7,
    "gradient_momentum": 0.0,
}
STEP = 2 * NUM_TASKS
"""The step that is traced: the last one of a round in which each task has had its turn."""

MODES = ("plain", "features", "tasks_per_step", "streaming")


def trace(run: Callable[[], object]) -> list[str]:
    """The files of the package that ``run`` is in, one after the other."""
    files: list[str] = []
    stack: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(PACKAGE):
            return
        if event == "call":
            stack.append(str(path.relative_to(PACKAGE)))
        elif stack:
            stack.pop()
        if stack and files[-1:] != stack[-1:]:
            files.append(stack[-1])

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


def step_of(mode: str, setting: dict[str, Any] = PUBLISHED) -> Callable[[], Callable[[], object]]:
    """Makes a balancer in ``mode``; each call computes losses and returns the step to be traced."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    heads = [nn.Linear(8, 1) for _ in range(NUM_TASKS)]
    inputs = torch.randn(4, 8)
    rotation = {"tasks_per_step": 1} if mode == "tasks_per_step" else {}
    balancer = ExcessMTL(encoder.parameters(), num_tasks=NUM_TASKS, **setting, **rotation)

    def prepare() -> Callable[[], object]:
        for module in (encoder, *heads):
            module.zero_grad()
        features = encoder(inputs)
        losses = [head(features).square().mean() for head in heads]
        if mode == "features":
            return lambda: balancer.backward(losses, features=features)
        if mode != "streaming":
            return lambda: balancer.backward(losses)

        def stream() -> None:
            for task, loss in enumerate(losses):
                balancer.accumulate(task, loss, retain_graph=task < NUM_TASKS - 1)
            balancer.finish()

        return stream

    return prepare


def traced_step(mode: str, setting: dict[str, Any] = PUBLISHED) -> list[str]:
    """The files that the sixth step in ``mode`` is in: what is made once is made by then."""
    prepare = step_of(mode, setting)
    for _ in range(STEP - 1):
        prepare()()
    return trace(prepare())


def num_changes(mode: str, setting: dict[str, Any] = PUBLISHED) -> int:
    """Changes of file in one step."""
    return len(traced_step(mode, setting)) - 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line per mode."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modes", nargs="*", default=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--show", action="store_true", help="print the files in order")
    parser.add_argument("--default", action="store_true", help="in the default setting")
    chosen = parser.parse_args(arguments)
    for mode in chosen.modes:
        files = traced_step(mode, {} if chosen.default else PUBLISHED)
        print(f"{mode}: {len(files) - 1} changes between {len(set(files))} files")
        if chosen.show:
            print("  " + " > ".join(files))


if __name__ == "__main__":
    main()
