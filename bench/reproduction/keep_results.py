"""Copies a sweep's tables to where they are committed, without what no figure reads.

    python bench/reproduction/keep_results.py SWEEP bench/reproduction/results/NAME

Kept of epochs.csv: all epochs at noise 0.8, which Figs. 2 and 3 show, and the last epoch at the other levels, without
the validation columns. results.csv, step_sizes.csv, sweep.json and environment.json are copied as they are.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from excessmtl_ext.training.pictures.sweep_view import SHOWN_NOISE
from excessmtl_ext.training.sweep.results import EPOCHS, RESULTS, SWEEP, read_results, write_table


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    results = read_results(arguments.sweep)
    last = max(row["epoch"] for row in results.epochs)
    kept = [
        {name: value for name, value in row.items() if not name.startswith("validation/")}
        for row in results.epochs
        if row["noise"] == SHOWN_NOISE or row["epoch"] == last
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_table(arguments.output / EPOCHS, kept)
    for name in (RESULTS, SWEEP, "step_sizes.csv", "environment.json"):
        if (arguments.sweep / name).is_file():
            shutil.copyfile(arguments.sweep / name, arguments.output / name)
    print(f"{len(kept)} of {len(results.epochs)} epochs kept in {arguments.output}")


if __name__ == "__main__":
    main()
