"""``excessmtl train``: one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table

from excessmtl_ext.training.cli.console import (
    clear_errors,
    make_console,
    print_path,
    progress_bar,
    resolve_device,
    stop_on_signal,
)
from excessmtl_ext.training.cli.options import run_options, workload_options
from excessmtl_ext.training.pictures.runs import draw_training, read_run
from excessmtl_ext.training.pictures.style import check_figure_path
from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.finished import selection_metric
from excessmtl_ext.training.run.loop import train as train_run
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.metrics import PRIMARY_METRIC
from excessmtl_ext.training.run.progress import Progress
from excessmtl_ext.training.run.ranks import is_main_process
from excessmtl_ext.training.run.record import FIGURE
from excessmtl_ext.training.run.workloads import WORKLOADS, Workload


@click.group()
def train() -> None:
    """Train on one data set with one balancer."""


def _add_train_command(dataset: str, workload: Workload) -> None:
    @train.command(dataset, help=f"Train on {workload.title}.")
    @run_options()
    @workload_options(workload)
    def command(
        device: str,
        output: Path | None,
        resume: bool,
        method_options: tuple[tuple[str, Any], ...],
        **values: Any,
    ) -> None:
        console = make_console(quiet=not is_main_process())
        with clear_errors():
            config = TrainConfig(
                dataset=dataset,
                device=resolve_device(device),
                method_options=dict(method_options),
                **values,
            )
            task = "" if config.task is None else f"_{quote(config.task, safe='')}"
            name = f"{config.method}{task}_noise{config.noise:g}_seed{config.seed}"
            _train_one(console, config, output or Path("runs") / dataset / name, resume=resume)


for _dataset, _workload in WORKLOADS.items():
    _add_train_command(_dataset, _workload)


def _train_one(console: Console, config: TrainConfig, output: Path, *, resume: bool) -> None:
    """Trains with a progress bar, draws the run and prints its numbers; of several processes only the first shows."""
    method = METHODS[config.method]
    selection = selection_metric(config.task)
    figure = output / FIGURE
    check_figure_path(figure)
    with stop_on_signal(console) as should_stop, progress_bar(console) as bar:
        task = bar.add_task(f"{method.label}", total=None)

        def report(progress: Progress) -> None:
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
    draw_training(
        [read_run(output)],
        figure,
        title=f"{WORKLOADS[config.dataset].title}, {config.noise:.0%} noise, seed {config.seed}",
        what="accuracy" if kinds == {"classification"} else "score",
    )
    console.print(_run_table(config, metrics))
    print_path(console, "Run", output)
    print_path(console, "Figure", figure)


def _run_table(config: TrainConfig, metrics: dict[str, Any]) -> Table:
    """Returns each task's primary metric on the test data; of a task trained alone, only its own."""
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
        value = selected[f"test/{name}_{metric}"]
        table.add_row(
            f"{name} (noisy)" if task["is_noisy"] else name,
            metric.replace("_", " "),
            "not finite" if value is None else f"{value:.4f}",
            f"{metrics['final_task_weights'][name]:.3f}",
        )
    return table
