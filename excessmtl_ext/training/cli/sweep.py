"""``excessmtl sweep``: a grid of runs under one progress display."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from excessmtl_ext.training.cli.console import (
    clear_errors,
    make_console,
    print_path,
    resolve_device,
    stop_on_signal,
)
from excessmtl_ext.training.cli.options import sweep_options, workload_options
from excessmtl_ext.training.run.methods import METHODS
from excessmtl_ext.training.run.workloads import WORKLOADS, Workload
from excessmtl_ext.training.sweep.cells import SweepConfig
from excessmtl_ext.training.sweep.jobs import SweepStatus
from excessmtl_ext.training.sweep.results import RESULTS
from excessmtl_ext.training.sweep.scheduler import FailedRun, SweepOutcome, run_sweep

# Methods differ in speed by a factor of ten: an estimate from the last half minute would jump with every run.
SECONDS_OF_SPEED = 3600.0


@click.group()
def sweep() -> None:
    """Compare methods over noise levels and seeds on one data set.

    Every run has a process and a folder of its own. The same command goes on after Ctrl-C or a crash
    and skips what is finished; with more methods, noise levels or seeds it extends the sweep.
    results.csv and epochs.csv hold all numbers.
    """


def _add_sweep_command(dataset: str, workload: Workload) -> None:
    @sweep.command(dataset, help=f"Compare methods on {workload.title}.")
    @sweep_options()
    @workload_options(workload)
    def command(device: str, output: Path | None, **values: Any) -> None:
        console = make_console()
        with clear_errors():
            options = {name: values.pop(name) for name in workload.options}
            config = SweepConfig(
                dataset=dataset, device=resolve_device(device), options=options, **values
            )
            _run_sweep(console, config, output or Path("runs") / f"{dataset}_sweep")


for _dataset, _workload in WORKLOADS.items():
    _add_sweep_command(_dataset, _workload)


def _run_sweep(console: Console, config: SweepConfig, output: Path) -> None:
    """Runs a sweep under one progress display; ends with status 1 if a run failed."""
    with (
        stop_on_signal(console, hint="The same command goes on from there.") as should_stop,
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
    print_path(console, "Results", output / RESULTS)
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
