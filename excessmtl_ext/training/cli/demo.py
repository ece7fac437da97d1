"""``excessmtl demo``: a comparison that needs no download."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from excessmtl_ext.training.cli.console import (
    clear_errors,
    count_seeds,
    print_path,
    progress_bar,
    stop_on_signal,
)
from excessmtl_ext.training.pictures.runs import draw_training, read_run
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.progress import Progress
from excessmtl_ext.training.run.workloads import WORKLOADS
from excessmtl_ext.training.sweep import demo as demo_runs

DEMO_FIGURE = "demo.png"


@click.command()
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
    with clear_errors():
        runs = list(demo_runs.demo_runs(output, num_seeds=seeds, epochs=epochs, device="cpu"))
        with stop_on_signal(console) as should_stop, progress_bar(console) as bar:
            task = bar.add_task("", total=None)

            def report(number: int, progress: Progress) -> None:
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
            f"{demo_runs.NOISE:.0%} of the bottom-right training labels replaced, {count_seeds(seeds)}",
            what="accuracy",
        )
        console.print(_demo_table(summaries, seeds))
        print_path(console, "Figure", figure)


def _demo_table(summaries: list[demo_runs.MethodSummary], num_seeds: int) -> Table:
    spread = ", mean ± standard deviation" if num_seeds > 1 else ""
    table = Table(
        title=f"{demo_runs.NOISE:.0%} of one task's training labels replaced, {count_seeds(num_seeds)}{spread}",
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
