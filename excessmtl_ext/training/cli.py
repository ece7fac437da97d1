"""The command ``excessmtl``: trains, compares, and says what went wrong in one line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'The command needs {error.name}, which is not installed: pip install "excessmtl_ext[train]".',
        name=error.name,
    ) from error

import torch

from excessmtl_ext.training import demo as demo_runs
from excessmtl_ext.training.config import TrainConfig
from excessmtl_ext.training.figures import draw_training, read_run
from excessmtl_ext.training.loop import Progress as TrainingProgress
from excessmtl_ext.training.loop import TrainingInterrupted
from excessmtl_ext.training.loop import train as train_run
from excessmtl_ext.training.methods import METHODS
from excessmtl_ext.training.workloads import WORKLOADS, Workload

FIGURE = "training.png"
DEMO_FIGURE = "demo.png"

# What a user can cause and repair; anything else is a fault of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="excessmtl-ext")
def main() -> None:
    """Train one network on several tasks whose labels cannot all be trusted."""


@main.group()
def train() -> None:
    """Train on one data set with one balancer."""


def _shared_options(workload: Workload) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that the commands of all data sets have, with this data set's defaults."""
    options = [
        click.option(
            "--method",
            type=click.Choice(list(METHODS)),
            default="excessmtl",
            show_default=True,
            help="How tasks are weighted.",
        ),
        click.option(
            "--robust-step-size",
            type=float,
            help="Step size of the weights.  [default: the method's own]",
        ),
        click.option(
            "--noise",
            type=click.FloatRange(0, 1),
            default=0.0,
            show_default=True,
            help="Share of the noisy task's training labels to replace.",
        ),
        click.option(
            "--epochs", type=click.IntRange(1), default=workload.epochs, show_default=True
        ),
        click.option(
            "--batch-size", type=click.IntRange(1), default=workload.batch_size, show_default=True
        ),
        click.option(
            "--lr", type=float, default=workload.lr, show_default=True, help="Of Adam, constant."
        ),
        click.option("--num-train", type=click.IntRange(1), help="Take fewer training samples."),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Decides parameters, splits, noise and batch order.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="cpu, cuda or cuda:N; auto takes a GPU where there is one.",
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
    if workload.needs_data_root:
        options.insert(
            0,
            click.option(
                "--data-root",
                envvar="EXCESSMTL_DATA",
                show_envvar=True,
                required=True,
                help="Folder that holds the data.",
            ),
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _add_train_command(dataset: str, workload: Workload) -> None:
    @train.command(dataset, help=f"Train on {workload.title}.")
    @_shared_options(workload)
    def command(device: str, output: Path | None, resume: bool, **values: Any) -> None:
        console = Console()
        with _clear_errors():
            config = TrainConfig(dataset=dataset, device=_resolve_device(device), **values)
            name = f"{config.method}_noise{config.noise:g}_seed{config.seed}"
            _train_one(console, config, output or Path("runs") / dataset / name, resume=resume)


for _dataset, _workload in WORKLOADS.items():
    _add_train_command(_dataset, _workload)


@main.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for the runs and the figure.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=demo_runs.NUM_SEEDS,
    show_default=True,
    help="Runs per method.",
)
@click.option("--epochs", type=click.IntRange(1), help="Per run.  [default: 30]")
@click.option("--resume", is_flag=True, help="Go on with a demo that was stopped.")
def demo(output: Path, seeds: int, epochs: int | None, resume: bool) -> None:
    """Compare ExcessMTL with Uniform and GroupDRO on small digits.

    Two handwritten digits share each image. 80 % of the second digit's training labels are replaced
    by random ones; all test labels are right. Needs no download and about a minute on two cores.
    """
    console = Console()
    with _clear_errors():
        runs = list(demo_runs.demo_runs(output, num_seeds=seeds, epochs=epochs, device="cpu"))
        with _stop_on_signal(console) as should_stop, _progress_bar(console) as bar:
            task = bar.add_task("", total=None)

            def report(number: int, progress: TrainingProgress) -> None:
                config = runs[number][0]
                bar.update(
                    task,
                    description=f"{METHODS[config.method].label}, seed {config.seed}",
                    completed=number * progress.num_steps + progress.step,
                    total=len(runs) * progress.num_steps,
                )

            summaries = demo_runs.run_demo(
                runs, resume=resume, report=report, should_stop=should_stop
            )
        figure = output / DEMO_FIGURE
        draw_training(
            [read_run(folder) for _, folder in runs],
            figure,
            title=f"{WORKLOADS[demo_runs.DATASET].title}, "
            f"{demo_runs.NOISE:.0%} of the bottom-right training labels replaced, {_count_seeds(seeds)}",
        )
        console.print(_demo_table(summaries, seeds))
        _print_path(console, "Figure", figure)


def _train_one(console: Console, config: TrainConfig, output: Path, *, resume: bool) -> None:
    """Trains with a progress bar, draws the run and prints its numbers."""
    method = METHODS[config.method]
    with _stop_on_signal(console) as should_stop, _progress_bar(console) as bar:
        task = bar.add_task(f"{method.label}", total=None)

        def report(progress: TrainingProgress) -> None:
            accuracy = progress.latest.get("validation/mean_accuracy")
            known = "" if accuracy is None else f", validation accuracy {accuracy:.3f}"
            bar.update(
                task,
                description=f"{method.label}, epoch {progress.epoch}/{config.epochs}{known}",
                completed=progress.step,
                total=progress.num_steps,
            )

        metrics = train_run(config, output, resume=resume, report=report, should_stop=should_stop)
    figure = output / FIGURE
    draw_training(
        [read_run(output)],
        figure,
        title=f"{WORKLOADS[config.dataset].title}, {config.noise:.0%} noise, seed {config.seed}",
    )
    console.print(_run_table(method.label, metrics))
    _print_path(console, "Run", output)
    _print_path(console, "Figure", figure)


def _run_table(label: str, metrics: dict[str, Any]) -> Table:
    selected = metrics["selected"]
    table = Table(
        title=f"{label}, epoch {selected['epoch']:.0f} (best mean accuracy on validation)",
        caption="Test labels are clean. Weights are those of the last step.",
    )
    table.add_column("Task")
    table.add_column("Test accuracy", justify="right")
    table.add_column("Final weight", justify="right")
    for task, weight in metrics["final_task_weights"].items():
        name = f"{task} (noisy)" if task in metrics["noisy_tasks"] else task
        table.add_row(name, f"{selected[f'test/{task}_accuracy']:.4f}", f"{weight:.3f}")
    return table


def _demo_table(summaries: list[demo_runs.MethodSummary], num_seeds: int) -> Table:
    spread = ", mean ± standard deviation" if num_seeds > 1 else ""
    table = Table(
        title=f"{demo_runs.NOISE:.0%} of one task's training labels replaced, {_count_seeds(num_seeds)}{spread}",
        caption="Accuracy on clean test labels, at the epoch with the best mean accuracy on "
        "validation. Weight at the end.",
    )
    table.add_column("Method")
    table.add_column("Clean task", justify="right")
    table.add_column("Noisy task", justify="right")
    table.add_column("Clean weight", justify="right")
    for row in summaries:
        table.add_row(
            METHODS[row.method].label,
            str(row.clean_accuracy),
            str(row.noisy_accuracy),
            str(row.clean_weight),
        )
    return table


def _count_seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _print_path(console: Console, what: str, path: Path) -> None:
    # Not wrapped: a path broken over two lines cannot be copied.
    console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def _resolve_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _progress_bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turns what a user can repair into one message."""
    try:
        yield
    except USER_ERRORS as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _stop_on_signal(console: Console) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or a termination signal has come.

    The loop asks between steps, so that the checkpoint never holds half a step; the interrupted run then ends with
    the exit status that shells expect, 130 for Ctrl-C. A second Ctrl-C does not wait.
    """
    received: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    # Python allows handlers in the main thread only; elsewhere a run cannot be stopped this way.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as interrupted:
        console.print(
            f"{interrupted} A checkpoint is saved: the same command with --resume goes on from there.",
            highlight=False,
        )
        raise SystemExit(128 + received[0]) from interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
