"""Time of a step as one compiled graph against the ordinary step and a plain summed loss, on one thread.

    python bench/bench_compiled_step.py                # a perceptron of three layers of 64, two and ten tasks
    python bench/bench_compiled_step.py --tasks 7 --width 128 --rows 256

A sample is one step without its optimizer, in CPU time, in which other programs count less. The ways take turns in one
process; a ratio is the median over rounds of the ratio within a round. Compiling is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from excessmtl_ext import ExcessMTL

NUM_INPUTS = 21


def ways(num_tasks: int, width: int, rows: int, backend: str) -> dict[str, Callable[[], object]]:
    """The steps by name; each has a model of its own, with equal parameters."""
    inputs, targets = torch.randn(rows, NUM_INPUTS), torch.randn(num_tasks, rows, 1)
    made: dict[str, Callable[[], object]] = {}

    def model() -> tuple[nn.Module, Callable[[Tensor, Tensor], list[Tensor]], list[nn.Parameter]]:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for fan_in in (NUM_INPUTS, width, width):
            layers += [nn.Linear(fan_in, width), nn.ReLU()]
        encoder = nn.Sequential(*layers)
        heads = nn.ModuleList([nn.Linear(width, 1) for _ in range(num_tasks)])

        def losses(x: Tensor, y: Tensor) -> list[Tensor]:
            features = encoder(x)
            return [
                nn.functional.mse_loss(head(features), target)
                for head, target in zip(heads, y, strict=True)
            ]

        return encoder, losses, [*encoder.parameters(), *heads.parameters()]

    def emptied(
        parameters: Sequence[nn.Parameter], run: Callable[[], object]
    ) -> Callable[[], object]:
        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            run()

        return step

    _, losses, parameters = model()
    made["plain"] = emptied(
        parameters, lambda of=losses: torch.stack(of(inputs, targets)).sum().backward()
    )
    for setting in ("published", "default"):
        options = {"robust_step_size": 0.01, "combine": "sum", "gradient_momentum": 0.0}
        options = options if setting == "published" else {}
        encoder, losses, parameters = model()
        balancer = ExcessMTL(encoder.parameters(), num_tasks=num_tasks, **options)
        made[f"ordinary, {setting}"] = emptied(
            parameters, lambda of=losses, by=balancer: by.backward(of(inputs, targets))
        )
        encoder, losses, parameters = model()
        balancer = ExcessMTL(encoder.parameters(), num_tasks=num_tasks, **options)
        step = balancer.compiled(losses, backend=backend)
        made[f"compiled, {setting}"] = emptied(parameters, lambda by=step: by(inputs, targets))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line per way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--backend", default="inductor")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for num_tasks in given.tasks:
        steps = ways(num_tasks, given.width, given.rows, given.backend)
        for step in steps.values():
            for _ in range(3):
                step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(given.rounds):
            for name, step in steps.items():
                begin = time.process_time()
                step()
                seconds[name].append(time.process_time() - begin)
        print(f"T = {num_tasks}, 3 x {given.width}, batch {given.rows}:")
        for name, times in seconds.items():
            twin = seconds[name.replace("compiled", "ordinary")]
            of_twin = statistics.median(a / b for a, b in zip(times, twin, strict=True))
            ratios = [one / other for one, other in zip(times, seconds["plain"], strict=True)]
            first, middle, last = statistics.quantiles(ratios, n=4)
            print(
                f"  {name:22} {statistics.median(times) * 1e3:8.3f} ms, "
                f"{middle:.2f} ({first:.2f} to {last:.2f}) of plain"
                + (f", {of_twin:.2f} of ordinary" if name.startswith("compiled") else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
