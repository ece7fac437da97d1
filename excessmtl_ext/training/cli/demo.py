"""``excessmtl demo``: a comparison that needs no download."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from excessmtl_ext.training.cli.console import (
    clear_errors,
    count_seeds,
    make_console,
    print_path,
    printable,
    progress_bar,
    stop_on_signal,
)
from excessmtl_ext.training.pictures.runs import draw_training, read_run
from excessmtl_ext.training.pictures.style import check_figure_path
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.progress import Progress
from excessmtl_ext.training.run.workloads import WORKLOADS
from excessmtl_ext.training.sweep import demo as demo_runs
from excessmtl_ext.training.sweep.demo import Statistic

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
    console = make_console()
    with clear_errors():
        figure = output / DEMO_FIGURE
        check_figure_path(figure)
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

            result = demo_runs.run_demo(runs, resume=resume, report=report, should_stop=should_stop)
        draw_training(
            [read_run(folder) for _, folder in runs],
            figure,
            title=f"{WORKLOADS[demo_runs.DATASET].title}, "
            f"{demo_runs.NOISE:.0%} of the bottom-right training labels replaced, {count_seeds(seeds)}",
            what="accuracy",
        )
        console.print(_table(console, result, seeds))
        for line in tell(result):
            console.print(printable(console, line), highlight=False, markup=False, soft_wrap=True)
        print_path(console, "Figure", figure)


def tell(result: demo_runs.DemoResult) -> list[str]:
    """Returns the lines below the table: what was found, what each method gains or pays, and the next step."""
    return [
        *_tell_findings(result),
        "",
        *_tell_gains(result),
        "",
        _tell_verdict(result),
        "",
        *_NEXT_STEP,
    ]


# Runs as it stands: the names are those of the loop that most people have.
_NEXT_STEP = (
    "Next, in your own loop:",
    "    balancer = ExcessMTL(model.encoder.parameters(), num_tasks=2)",
    '    balancer.record_history(gradients=True, task_names=["a", "b"])',
    "    balancer.backward([loss_a, loss_b])    # instead of (loss_a + loss_b).backward()",
    "    print(balancer.report())               # after some hundred steps: whose labels to look at",
)


def _tell_findings(result: demo_runs.DemoResult) -> list[str]:
    if not result.findings:
        return ["No report: the runs were finished before this command, and nothing was recorded."]
    num = len(result.findings)
    named = sorted({name for finding in result.findings for name in finding.noisy})
    counts = [
        f"{name} in {sum(name in finding.noisy for finding in result.findings)} of {num} "
        f"run{'s' * (num > 1)}"
        for name in named
    ]
    found = f"Found noisy without being told: {', '.join(counts) or 'no task'}."
    truth = f"It is {result.noisy_task}." if named != [result.noisy_task] else "Which it is."
    first = result.findings[0]
    return [
        f"{found} {truth}",
        "",
        f"balancer.report() of seed {first.seed}:",
        *(f"    {line}".rstrip() for line in first.text.splitlines()),
    ]


def _tell_gains(result: demo_runs.DemoResult) -> list[str]:
    baseline = METHODS[demo_runs.BASELINE].label
    lines = [f"Against {baseline}, on the same seeds, in points of accuracy:"]
    for summary in result.methods:
        if summary.method == demo_runs.BASELINE:
            continue
        parts = (
            f"the clean task {_gain(summary.clean_gain)}",
            f"the noisy task {_gain(summary.noisy_gain)}",
        )
        lines.append(f"    {METHODS[summary.method].label}: {', '.join(parts)}")
    return lines


def _gain(gain: Statistic) -> str:
    spread = "" if gain.std is None else f" ± {100 * gain.std:.1f}"
    points = f"{100 * abs(gain.mean):.1f}{spread}"
    if gain.std is not None and gain.sign == 0:
        return f"the same ({100 * gain.mean:+.1f}{spread})"
    return f"{'gains' if gain.mean > 0 else 'pays'} {points}"


def _tell_verdict(result: demo_runs.DemoResult) -> str:
    ours, baseline = METHODS[demo_runs.RECOMMENDED].label, METHODS[demo_runs.BASELINE].label
    summary = result.of(demo_runs.RECOMMENDED)
    clean, noisy = summary.clean_gain, summary.noisy_gain
    if clean.std is None:
        return "One seed tells no gain from chance: excessmtl demo --seeds 5 does."
    price = {
        1: f"and so is {result.noisy_task}, whose labels are wrong",
        0: f"and it costs {result.noisy_task} nothing",
        -1: f"and {result.noisy_task}, whose labels are wrong, pays for it",
    }[noisy.sign]
    if clean.sign > 0:
        return (
            f"{result.clean_task} is better off with {ours} than with {baseline}, {price}. Use it where the tasks with "
            "right labels are the ones that count."
        )
    if clean.sign == 0:
        return (
            f"{result.clean_task} is no better off with {ours} than with {baseline}: beyond what seeds differ by, its "
            f"weight gained it nothing here. Keep {baseline} where you see the same, and use the report to find the "
            "task whose labels to mend."
        )
    return (
        f"{result.clean_task} is worse off with {ours} than with {baseline} here. Keep {baseline}, and use the report "
        "to find the task whose labels to mend."
    )


def _table(console: Console, result: demo_runs.DemoResult, num_seeds: int) -> Table:
    spread = ", mean ± standard deviation" if num_seeds > 1 else ""
    title = f"{demo_runs.NOISE:.0%} of one task's training labels replaced, {count_seeds(num_seeds)}{spread}"
    table = Table(
        title=printable(console, title),
        caption="Accuracy on clean test labels, at the epoch with the best mean accuracy on "
        "validation. Weight at the end.",
    )
    table.add_column("Method")
    table.add_column("Clean task", justify="right")
    table.add_column("Noisy task", justify="right")
    table.add_column("Clean weight", justify="right")
    for row in result.methods:
        numbers = (row.clean_accuracy, row.noisy_accuracy, row.clean_weight)
        table.add_row(
            METHODS[row.method].label, *(printable(console, str(number)) for number in numbers)
        )
    return table
