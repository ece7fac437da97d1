"""``excessmtl figures`` and ``excessmtl report``: pictures of what has been run."""

from __future__ import annotations

from pathlib import Path

import click

from excessmtl_ext.training.cli.console import clear_errors, make_console, print_path
from excessmtl_ext.training.pictures.paper import draw_paper_figures
from excessmtl_ext.training.pictures.report import write_report
from excessmtl_ext.training.pictures.toy import draw_toy
from excessmtl_ext.training.sweep.results import read_results


@click.command()
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
    console = make_console()
    with clear_errors():
        sweeps = [read_results(folder) for folder in results]
        reports = draw_paper_figures(sweeps, output, draw_toy=draw_toy)
    for report in reports:
        if report.path is not None:
            print_path(console, report.name, report.path)
    for report in reports:
        if report.path is None:
            print_path(console, f"{report.name}: not drawn, needs", report.missing)


@click.command()
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
    with clear_errors():
        path = write_report(run, output)
    print_path(make_console(), "Report", path)
