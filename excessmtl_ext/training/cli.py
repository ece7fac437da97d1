"""The command ``excessmtl``: trains, compares, and says what went wrong in one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import click
    from click.core import ParameterSource
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'The command needs {error.name}, which is not installed: pip install "excessmtl_ext[train]".',
        name=error.name,
    ) from error

import torch

from excessmtl_ext.training import demo as demo_runs
from excessmtl_ext.training.config import TrainConfig
from excessmtl_ext.training.figures import draw_training, read_run
from excessmtl_ext.training.loop import SELECTION_METRIC, TrainingInterrupted
from excessmtl_ext.training.loop import Progress as TrainingProgress
from excessmtl_ext.training.loop import train as train_run
from excessmtl_ext.training.methods import METHODS
from excessmtl_ext.training.metrics import PRIMARY_METRIC
from excessmtl_ext.training.paper_figures import draw_paper_figures
from excessmtl_ext.training.ranks import OtherRankFailed, is_main_process
from excessmtl_ext.training.run_report import write_report
from excessmtl_ext.training.sweep import (
    FailedRun,
    SweepConfig,
    SweepOutcome,
    SweepStatus,
    run_sweep,
)
from excessmtl_ext.training.sweep_results import RESULTS, read_results
from excessmtl_ext.training.toy import draw_toy
from excessmtl_ext.training.workloads import WORKLOADS, Workload

FIGURE = "training.png"
DEMO_FIGURE = "demo.png"

SWEEP_NOISE = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

# Methods differ in speed by a factor of ten: an estimate from the last half minute would jump with every run.
SECONDS_OF_SPEED = 3600.0

# What a user can cause and repair; anything else is a fault of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError, OtherRankFailed)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="excessmtl-ext")
def main() -> None:
    """Train one network on several tasks whose labels cannot all be trusted."""


@main.group()
def train() -> None:
    """Train on one data set with one balancer."""


@main.group()
def sweep() -> None:
    """Compare methods over noise levels and seeds on one data set.

    Every run has a process and a folder of its own. The same command goes on after Ctrl-C or a crash
    and skips what is finished; with more methods, noise levels or seeds it extends the sweep.
    results.csv and epochs.csv hold all numbers.
    """


class _CommaList(click.ParamType):
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


class _NamedValue(click.ParamType):
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


_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _together(options: Sequence[_Decorator]) -> _Decorator:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _workload_options(workload: Workload) -> _Decorator:
    """The options of a data set, with its defaults, whether one run is trained or many."""
    options: list[_Decorator] = []
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


_SPECIAL_OPTIONS: dict[str, _Decorator] = {
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


def _run_options() -> _Decorator:
    """The options of a single run."""
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
                type=_NamedValue(),
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


def _sweep_options() -> _Decorator:
    """The options of a grid of runs."""
    return _together(
        [
            click.option(
                "--methods",
                type=_CommaList(click.Choice(list(METHODS))),
                default=tuple(METHODS),
                help="Methods to compare; single-task is one run per task.  [default: all]",
            ),
            click.option(
                "--noise",
                type=_CommaList(click.FloatRange(0, 1)),
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
                type=_CommaList(click.FLOAT),
                default=(),
                help="Step sizes of the weights to choose from, per method.  [default: the methods' own]",
            ),
            click.option(
                "--tune-noise",
                type=_CommaList(click.FloatRange(0, 1)),
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


def _add_train_command(dataset: str, workload: Workload) -> None:
    @train.command(dataset, help=f"Train on {workload.title}.")
    @_run_options()
    @_workload_options(workload)
    def command(
        device: str,
        output: Path | None,
        resume: bool,
        method_options: tuple[tuple[str, Any], ...],
        **values: Any,
    ) -> None:
        console = Console(quiet=not is_main_process())
        with _clear_errors():
            config = TrainConfig(
                dataset=dataset,
                device=_resolve_device(device),
                method_options=dict(method_options),
                **values,
            )
            method = config.method if config.task is None else f"{config.method}_{config.task}"
            name = f"{method}_noise{config.noise:g}_seed{config.seed}"
            _train_one(console, config, output or Path("runs") / dataset / name, resume=resume)


def _add_sweep_command(dataset: str, workload: Workload) -> None:
    @sweep.command(dataset, help=f"Compare methods on {workload.title}.")
    @_sweep_options()
    @_workload_options(workload)
    def command(device: str, output: Path | None, **values: Any) -> None:
        console = Console()
        with _clear_errors():
            options = {name: values.pop(name) for name in workload.options}
            config = SweepConfig(
                dataset=dataset, device=_resolve_device(device), options=options, **values
            )
            _run_sweep(console, config, output or Path("runs") / f"{dataset}_sweep")


for _dataset, _workload in WORKLOADS.items():
    _add_train_command(_dataset, _workload)
    _add_sweep_command(_dataset, _workload)


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
            what="accuracy",
        )
        console.print(_demo_table(summaries, seeds))
        _print_path(console, "Figure", figure)


@main.command()
@click.argument(
    "results",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("figures"),
    show_default=True,
    help="Folder for the figures.",
)
def figures(results: tuple[Path, ...], output: Path) -> None:
    """Draw the paper's figures from sweeps.

    RESULTS are folders that `excessmtl sweep` has filled; sweep.json, results.csv and epochs.csv of each suffice.
    """
    console = Console()
    with _clear_errors():
        sweeps = [read_results(folder) for folder in results]
        reports = draw_paper_figures(sweeps, output, draw_toy=draw_toy)
    for report in reports:
        if report.path is not None:
            _print_path(console, report.name, report.path)
    for report in reports:
        if report.path is None:
            _print_path(console, f"{report.name}: not drawn, needs", report.missing)


@main.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The HTML file.  [default: RUN/report.html]",
)
def report(run: Path, output: Path | None) -> None:
    """Show a run in one HTML file.

    RUN is a folder that `excessmtl train` has filled or is filling. The file holds the curves of every task, the
    results, the settings and where it ran; it can be sent to others as it is.
    """
    with _clear_errors():
        path = write_report(run, output)
    _print_path(Console(), "Report", path)


def _train_one(console: Console, config: TrainConfig, output: Path, *, resume: bool) -> None:
    """Trains with a progress bar, draws the run and prints its numbers; of several processes only the first shows."""
    method = METHODS[config.method]
    selection = SELECTION_METRIC if config.task is None else f"validation/{config.task}_score"
    with _stop_on_signal(console) as should_stop, _progress_bar(console) as bar:
        task = bar.add_task(f"{method.label}", total=None)

        def report(progress: TrainingProgress) -> None:
            score = progress.latest.get(selection)
            known = "" if score is None else f", validation score {score:.3f}"
            bar.update(
                task,
                description=f"{method.label}, epoch {progress.epoch}/{config.epochs}{known}",
                completed=progress.step,
                total=progress.num_steps,
            )

        metrics = train_run(config, output, resume=resume, report=report, should_stop=should_stop)
    if not is_main_process():
        return
    kinds = {task["kind"] for task in metrics["tasks"]}
    figure = output / FIGURE
    draw_training(
        [read_run(output)],
        figure,
        title=f"{WORKLOADS[config.dataset].title}, {config.noise:.0%} noise, seed {config.seed}",
        what="accuracy" if kinds == {"classification"} else "score",
    )
    console.print(_run_table(config, metrics))
    _print_path(console, "Run", output)
    _print_path(console, "Figure", figure)


def _run_sweep(console: Console, config: SweepConfig, output: Path) -> None:
    """Runs a sweep under one progress display; ends with status 1 if a run failed."""
    with (
        _stop_on_signal(console, hint="The same command goes on from there.") as should_stop,
        _SweepDisplay(console) as display,
    ):
        outcome = run_sweep(
            config,
            output,
            command=_command_line(),
            report=display.report,
            announce=display.announce,
            should_stop=should_stop,
        )
    console.print(_sweep_table(outcome))
    _print_path(console, "Results", output / RESULTS)
    if outcome.failed:
        console.print(_failure_table(outcome.failed))
        raise SystemExit(1)


class _SweepDisplay:
    """One bar over all runs, with the time that is left, and one per job; a line for each run that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=SECONDS_OF_SPEED,
        )
        self._all: TaskID | None = None
        self._jobs: list[TaskID] = []
        self._names: list[str | None] = []

    def __enter__(self) -> _SweepDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def announce(self, line: str) -> None:
        """Prints a line above the bars, or into the log where there is no terminal."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def report(self, status: SweepStatus) -> None:
        """Moves the bars."""
        done = status.num_done + sum(job.share for job in status.jobs if job is not None)
        if self._all is None:
            # Runs of earlier commands are in the bar from the start: they tell nothing about the speed.
            self._all = self._progress.add_task("All runs", total=status.num_runs, count="")
            self._progress.reset(self._all, completed=status.num_done)
            self._jobs = [
                self._progress.add_task("", total=None, count="", visible=False)
                for _ in status.jobs
            ]
            self._names = [None] * len(status.jobs)
        self._progress.update(
            self._all, completed=done, count=f"{status.num_done}/{status.num_runs} runs"
        )
        for slot, (bar, job) in enumerate(zip(self._jobs, status.jobs, strict=True)):
            if job is None:
                self._progress.update(bar, visible=False)
                continue
            if job.name != self._names[slot]:
                self._names[slot] = job.name
                self._progress.reset(bar, description=job.name, visible=True, total=None)
            score = "" if job.score is None else f", score {job.score:.3f}"
            self._progress.update(
                bar,
                visible=True,
                completed=job.step,
                total=job.num_steps or None,
                count=f"epoch {job.epoch}{score}",
            )


def _command_line() -> str:
    """Returns the command as given, options that were left to their defaults aside."""
    context = click.get_current_context()
    words = [*context.command_path.split()]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        items = value if isinstance(value, tuple) else (value,)
        text = ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in items)
        words += [parameter.opts[0], text]
    return shlex.join(words)


def _sweep_table(outcome: SweepOutcome) -> Table:
    table = Table(title="Sweep")
    table.add_column("Runs")
    table.add_column("Number", justify="right")
    table.add_row("finished", str(outcome.num_finished))
    table.add_row("of them before this command", str(outcome.num_skipped))
    table.add_row("failed", str(len(outcome.failed)))
    for method, step_size in outcome.step_sizes.items():
        table.add_row(f"step size of {METHODS[method].label}", f"{step_size:g}")
    return table


def _failure_table(failed: Sequence[FailedRun]) -> Table:
    table = Table(title="Failed runs", caption="The same command tries them again.")
    table.add_column("Run")
    table.add_column("Reason")
    table.add_column("Log")
    for run in failed:
        table.add_row(
            Text(run.name), Text(run.reason), Text("" if run.log is None else str(run.log))
        )
    return table


def _run_table(config: TrainConfig, metrics: dict[str, Any]) -> Table:
    """Each task's primary metric on the test data; of a task trained alone, only its own."""
    selected = metrics["selected"]
    table = Table(
        title=f"{METHODS[config.method].label}, epoch {selected['epoch']:.0f} (best score on validation)",
        caption="Test labels are clean. Weights are those of the last step.",
    )
    table.add_column("Task")
    table.add_column("Metric")
    table.add_column("Test", justify="right")
    table.add_column("Final weight", justify="right")
    for task in metrics["tasks"]:
        name = task["name"]
        if config.task not in (None, name):
            continue
        metric = PRIMARY_METRIC[task["kind"]]
        table.add_row(
            f"{name} (noisy)" if task["is_noisy"] else name,
            metric.replace("_", " "),
            f"{selected[f'test/{name}_{metric}']:.4f}",
            f"{metrics['final_task_weights'][name]:.3f}",
        )
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


def _print_path(console: Console, what: str, path: Path | str) -> None:
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
def _stop_on_signal(
    console: Console, hint: str = "The same command with --resume goes on from there."
) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or a termination signal has come.

    The loop asks between steps, so that the checkpoint never holds half a step; the interrupted run then ends with
    the exit status that shells expect, 130 for Ctrl-C. A second Ctrl-C does not wait, but for processes of torchrun:
    they get each signal twice, from the terminal and from torchrun, which ends them itself if they take too long.
    """
    received: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        if received and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        received.append(number)

    # Python allows handlers in the main thread only; elsewhere a run cannot be stopped this way.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as interrupted:
        console.print(f"{interrupted} A checkpoint is saved. {hint}", highlight=False)
        # Of several processes perhaps another one was asked.
        raise SystemExit(128 + (received[0] if received else signal.SIGTERM)) from interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
